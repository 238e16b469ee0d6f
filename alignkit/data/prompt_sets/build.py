"""Writes the sets that are made from templates: `python -m alignkit.data.prompt_sets.build`. Always the same files."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from random import Random

from alignkit.data.prompt_sets import FOLDER


def _words(text: str) -> list[str]:
    return text.split()


THINGS = _words(
    "apple backpack ball balloon banana basket bench bicycle boat book bottle bowl box bus car chair clock cup door "
    "drum flower guitar hat house kite ladder lamp mug pillow plate shirt shoe sofa suitcase table teapot train "
    "umbrella vase"
)
HELD_OUT_THINGS = _words("bucket cake candle carpet dress envelope fence fork jacket mirror piano scooter sign wagon")
PLURALS = _words(
    "apples balls balloons bananas birds boats books bottles bowls boxes cars cats chairs clocks cups dogs ducks "
    "eggs flowers horses kites lamps lemons mugs oranges plates rabbits shoes spoons trees umbrellas vases"
)
HELD_OUT_PLURALS = _words("buckets candles carrots cows forks frogs keys mirrors pears penguins sheep stars")
ATTRIBUTES = (
    _words("red orange yellow green blue purple pink brown black white gray"),
    _words("round square oval rectangular triangular"),
    _words("wooden glass metal plastic leather paper stone ceramic"),
    _words("striped spotted fluffy shiny rusty"),
)
"""Colours, shapes, materials, textures. Two of one prompt are of one kind, so that they can be exchanged."""
NUMBERS = _words("two three four five six")
PLACES = ("to the left of", "to the right of", "above", "below", "next to")


def build() -> dict[str, list[str]]:
    """The prompts of each set by its name."""
    out = {}
    for suffix, things, plurals, count in (
        ("", THINGS, PLURALS, 300),
        ("_held_out", HELD_OUT_THINGS, HELD_OUT_PLURALS, 60),
    ):
        chance = Random(0)
        out[f"attributes{suffix}"] = attributes(things, count, chance)
        out[f"counting{suffix}"] = counting(plurals, count, chance)
        out[f"spatial{suffix}"] = spatial(things, count, chance)
    return out


def attributes(things: Sequence[str], count: int, chance: Random) -> list[str]:
    """As many of each kind of attribute, "a red car and a blue door"."""
    found: dict[str, None] = {}
    while len(found) < count:
        kind = ATTRIBUTES[len(found) % len(ATTRIBUTES)]
        (one, other), (first, second) = chance.sample(things, 2), chance.sample(kind, 2)
        found[f"{a(first)} {one} and {a(second)} {other}"] = None
    return list(found)


def counting(plurals: Sequence[str], count: int, chance: Random) -> list[str]:
    """Half of them of one thing, "three cups", the others of two."""
    single = [f"{number} {thing}" for number, thing in product(NUMBERS, plurals)]
    found = dict.fromkeys(chance.sample(single, count // 2))
    while len(found) < count:
        (one, other), (first, second) = chance.sample(plurals, 2), chance.choices(NUMBERS, k=2)
        found[f"{first} {one} and {second} {other}"] = None
    return chance.sample(list(found), count)


def spatial(things: Sequence[str], count: int, chance: Random) -> list[str]:
    """As many of each place, "a cup to the left of an apple"."""
    found: dict[str, None] = {}
    while len(found) < count:
        place = PLACES[len(found) % len(PLACES)]
        one, other = chance.sample(things, 2)
        found[f"{a(one)} {place} {a(other)}"] = None
    return list(found)


def a(word: str) -> str:
    """`word` behind its article; none of the words above begins with a vowel that is not spoken as one."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


if __name__ == "__main__":
    for name, prompts in build().items():
        (FOLDER / f"{name}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        print(f"wrote {FOLDER / name}.txt")
