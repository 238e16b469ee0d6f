"""Find noun phrases and their attributes by rules: closed word lists and a scan from left to right.

Made for prompts that name objects with adjectives ("a fluffy dog and a wooden chair next to it"), where it nearly
always agrees with a statistical tagger. For free prose, give the phrases with the prompt (`metadata["phrases"]`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from alignkit import Example
from alignkit.errors import ConfigError


@dataclass(frozen=True)
class Phrase:
    """An object that a prompt names: "two small red wooden chairs" is ("chairs", ("small", "red", "wooden"), True)."""

    head: str
    attributes: tuple[str, ...] = ()
    plural: bool = False


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


COLORS = _words(
    "red orange yellow green blue purple pink brown black white gray grey gold golden silver beige tan turquoise teal "
    "cyan magenta violet maroon navy ivory cream crimson scarlet indigo lavender olive burgundy amber bronze copper "
    "khaki peach lime coral multicolored multicolor colorful rainbow transparent clear"
)
SHAPES = _words(
    "round circular square rectangular triangular oval spherical cubic cubed cylindrical conical oblong hexagonal "
    "octagonal pentagonal pyramidal rounded curved pointed pointy flat crescent teardrop elliptical diagonal straight"
)
MATERIALS = {
    "wooden": "wood", "wood": "wood", "glass": "glass", "metal": "metal", "metallic": "metal", "plastic": "plastic",
    "leather": "leather", "fabric": "fabric", "rubber": "rubber", "stone": "stone", "brick": "brick", "paper": "paper",
    "ceramic": "ceramic", "concrete": "concrete", "cotton": "cotton", "woolen": "wool", "wool": "wool", "silk": "silk",
    "velvet": "velvet", "marble": "marble", "steel": "steel", "iron": "iron", "brass": "brass", "bamboo": "bamboo",
    "wicker": "wicker", "denim": "denim", "cardboard": "cardboard", "clay": "clay", "porcelain": "porcelain",
}  # fmt: skip
"""The adjective before a noun, and the name of the material."""
OTHERS = _words(
    "small large big little tiny huge giant tall short long wide narrow thick thin mini massive gigantic enormous old "
    "new young modern vintage antique ancient shiny glossy matte smooth rough soft hard fluffy furry fuzzy hairy wooly "
    "striped spotted checkered dotted plaid patterned floral ornate plain colored shaped wet dry dirty clean empty "
    "full open closed broken cracked rusty dusty bright dark light pale deep beautiful pretty cute ugly happy sad curly"
)
ATTRIBUTES = COLORS | SHAPES | MATERIALS.keys() | OTHERS

_SHADES = _words("dark light bright pale deep")
_ONE = _words("a an one another this that each every")
_MANY = _words("two three four five six seven eight nine ten eleven twelve several many few these those both")
_DETERMINERS = _ONE | _MANY | _words("the some any all its his her their my your our no")
_COPULAS = _words("is are was were")
_STOPS = _words(
    "and or but with without of in on at by to from into onto over under above below behind beside besides between "
    "near next against around across through inside outside along among beneath underneath off up down out left right "
    "front upon toward towards past as while when where which who it's that's there's than then for about it they he "
    "she him them there here not so be been being has have had do does did can could will would may might must should "
    "very quite also too sits sit sat stands stand stood lies lie lay lays hangs hang rests rest leans lean holds "
    "hold wears wear eats eat walks walk runs run flies looks look plays play covers cover rides ride drives drive "
    "grows grow fills surrounds shines reflects blooms flows floats swims jumps catches contrasts complements matches "
    "makes adds creates provides provide reads read says say said written"
)
_CLOSED = _DETERMINERS | _COPULAS | _STOPS
_PARTICIPLE = re.compile(r".{2,}(ing|ed|ly)")
_NOUNS = _words(
    "ring king wing string spring building ceiling painting earring clothing swing wedding evening morning bed shed "
    "sled seed weed butterfly dragonfly fly lily family belly jelly thing lightning pudding stocking bedding red"
)
"""Words that end like a participle or an adverb but are nouns (or the colour red)."""
_COLLECTIONS = _words(
    "pair group bunch piece set lot couple pile stack row photo photograph picture image illustration drawing painting "
    "rendering render sketch portrait close-up closeup type kind slice"
)
"""Words that do not name the object itself when "of" follows, as in "a pair of shoes" or "a photo of a dog"."""
_PLACES = _words("top side front back middle center centre bottom foreground background corner edge end")
"""Words that describe the layout; they count as objects only with an attribute of their own."""
_IRREGULAR_PLURALS = _words("people men women children feet teeth mice geese")
_ALSO_NOUNS = SHAPES | MATERIALS.keys() | _words("orange light rainbow lime peach coral olive")
_SINGULARS = _words("lens gas canvas atlas christmas")


TRAILING = ("made of ", "in ", "painted ")
"""Beginnings of attributes that follow their noun: "a cat made of glass", "a sign in red", "a car painted red"."""
_HYPHENATED = ("-colored", "-shaped")
_HAS_PART = re.compile(r"[a-z]+(-[a-z]+)*-[a-z]+ed")
"""Adjectives for a part of the object: "red-haired", "one-eyed"."""
_MADE_OF = re.compile(r"made (?:\w+ly )?(?:out )?(?:of|from) ")
_QUOTED = re.compile(r"""(?<!\w)"[^"]*"|“[^”]*”|(?<!\w)'[^']*'(?!\w)|\d+\"""")
"""Quoted text, and lengths in inches such as 5"."""


def _is_attribute(word: str) -> bool:
    has_part = _HAS_PART.fullmatch(word) and word.rpartition("-")[2] not in _NOUNS
    return all(part in ATTRIBUTES for part in word.split("-")) or word.endswith(_HYPHENATED) or bool(has_part)


def _is_participle(word: str) -> bool:
    noun = word.rpartition("-")[2] in _NOUNS  # "a sofa-bed"
    return bool(_PARTICIPLE.fullmatch(word)) and not noun and not _is_attribute(word)


def _is_name(word: str) -> bool:
    """Whether the word may be part of a noun phrase: neither punctuation nor a stop word."""
    return word[0].isalnum() and word not in _CLOSED


def phrases(example: Example) -> list[Phrase]:
    """Return the phrases in the metadata, a list of {"head", "attributes", "plural"}, or else those in the text."""
    given = example.metadata.get("phrases")
    if given is None:
        return find_phrases(example.text)
    return [_given(item, example.text) for item in (given if isinstance(given, list | tuple) else [given])]


def _given(item: Any, text: str) -> Phrase:
    expected = '{"head": "bench", "attributes": ["red"], "plural": false}'
    if not isinstance(item, dict) or not isinstance(item.get("head"), str) or item.keys() - Phrase.__annotations__:
        raise ConfigError(f"prompt {text!r}: metadata phrases: found {item!r}, expected {expected}")
    attributes = item.get("attributes", ())
    if not isinstance(attributes, list | tuple) or not all(isinstance(word, str) for word in attributes):
        raise ConfigError(f"prompt {text!r}: metadata phrases: attributes is {attributes!r}, expected a list of words")
    return Phrase(item["head"].lower(), tuple(word.lower() for word in attributes), bool(item.get("plural", False)))


def find_phrases(text: str) -> list[Phrase]:
    """Return the noun phrases of `text`, in order.

    A phrase is a run of words up to punctuation or a stop word (preposition, verb, pronoun). The words up to the last
    known attribute, excluding the last word of the run, are its attributes ("a strange red fire hydrant"); the rest is
    the head. "black and white cat" and "big, red ball" are one phrase; in "the car is red" the colour belongs to the
    car; in "a cat made of glass", "a sign in red" and "a car painted red" the attribute follows the noun. Quoted text
    is text to be rendered in the image, not a phrase.
    """
    tokens = _tokens(text)
    found: list[Phrase] = []
    run: list[str] = []
    number = ""
    predicate = False
    for i, token in enumerate([*tokens, "."]):
        following = tokens[i + 1] if i + 1 < len(tokens) else "."
        bare = bool(run) and all(map(_is_attribute, run))
        if " " in token:  # an attribute that follows its noun
            named = _phrase(run, number, then=token) if run else found[-1:]
            found += named if run else []
            if named:
                found[-1] = replace(named[-1], attributes=(*named[-1].attributes, token))
            run, number = [], ""
            continue
        joined = token in ("and", ",") and _is_attribute(following)
        if joined and bare and run[-1] not in SHAPES and not predicate:
            continue
        if _is_participle(token):
            if not run or bare:  # "a painted chair", "a red painted chair", "a brightly lit room"
                continue
        elif token.endswith(("'s", "’s")) and token not in _CLOSED:  # "a man's red hat" names a man and a hat
            run.append(token[:-2])
        elif _is_name(token) and not token.isdigit():
            run.append(token)
            continue
        if found and predicate and bare:
            last = found[-1]
            found[-1] = Phrase(last.head, (*last.attributes, *_attributes(run)), last.plural)
        elif run:
            found.extend(_phrase(run, number, then=token))
        run = []
        predicate = token in _COPULAS or (predicate and joined)
        number = token if token in _DETERMINERS or token.isdigit() else ""
    return found


def _tokens(text: str) -> list[str]:
    """Split into words and punctuation outside of quotes; an attribute after its noun is one token with blanks."""
    text = text.lower().replace("colour", "color")
    outside = _QUOTED.sub(" ", text)
    words: list[str] = []
    for word in re.findall(r"[a-z0-9]+(?:[-'’][a-z0-9]+)*|[,.;:!?]", outside if re.search(r"\w", outside) else text):
        parts = word.split("-and-")  # "black-and-white"
        words += " and ".join(parts).split() if all(map(_is_attribute, parts)) else [word]
    out: list[str] = []
    while words:
        found, length = _trailing_attributes(out[-1] if out else ".", [*words, ".", ".", "."])
        out += found or words[:1]
        words = words[length or 1 :]
    return out


def _trailing_attributes(before: str, words: Sequence[str]) -> tuple[list[str], int]:
    """Return the attributes of the noun `before` that `words` begin with, and the number of words they take."""
    made = _MADE_OF.match(" ".join([*words[:4], ""]))
    start = end = made[0].count(" ") if made else 1
    if made:
        while (words[end] == "and" and {words[end - 1], words[end + 1]} <= COLORS) or (
            _is_name(words[end]) and (end == start or not _is_participle(words[end]) or _is_participle(words[end - 1]))
        ):
            end += 1
        verb = words[end] in _DETERMINERS and end > start + 1  # the last word was a verb, as in `_phrase`
        found = ["made of " + " ".join(words[start : end - verb])] if end > start else []
        while found:
            step = 2 if words[end] == "," and words[end + 1] == "and" else 1
            if words[end] not in ("and", ",") or words[end + step] not in MATERIALS or _is_name(words[end + step + 1]):
                break
            found.append(f"made of {words[end + step]}")
            end += step + 1
        return found, end
    # Matches "a car painted red", but not "a painted red car" or "a newly painted red car".
    noun = _is_name(before) and not _is_attribute(before) and not before.endswith("ly")
    if words[0] != "in" and not (words[0] == "painted" and noun):
        return [], 0
    while words[end] in COLORS | _SHADES | {"and"}:
        end += 1
    end -= words[end - 1] == "and"
    if words[end - 1] in COLORS and (not _is_name(words[end]) or _is_participle(words[end])):
        return [" ".join(words[:end])], end
    return [], 0


def _phrase(run: Sequence[str], number: str, then: str) -> list[Phrase]:
    """Return the phrase made of `run`, or none; `number` (a determiner or "") precedes it and `then` follows it."""
    known = [i for i, word in enumerate(run[:-1]) if _is_attribute(word)]
    cut = known[-1] + 1 if known else 0
    head = list(run[cut:])
    if then in _DETERMINERS and len(head) > 1:  # noun phrases are never adjacent: the last word was a verb
        head.pop()
    if len(head) == 1 and _is_attribute(head[0]) and head[0] not in _ALSO_NOUNS:
        return []  # adjectives without a noun
    if (then == "of" and head[-1] in _COLLECTIONS) or (head[-1] in _PLACES and not cut and " " not in then):
        return []
    name = head[-1]
    plural = name.endswith("s") and not name.endswith(("ss", "us", "is")) and name not in _SINGULARS
    plural = plural or name in _IRREGULAR_PLURALS or number in _MANY or (number.isdigit() and number != "1")
    return [Phrase(" ".join(head), _attributes(run[:cut]), plural)]


def _attributes(words: Sequence[str]) -> tuple[str, ...]:
    """Return each attribute once; "dark red" and "cream colored" are one attribute each."""
    out: list[str] = []
    for i, word in enumerate(words):
        if word in ("colored", "shaped"):
            if out:  # "brightly colored" names no colour to ask about
                out[-1] = f"{out[-1]}-{word}"
        elif i and words[i - 1] in _SHADES and word in COLORS:
            out[-1] = f"{out[-1]} {word}"
        else:
            out.append(word)
    return tuple(dict.fromkeys(out))
