"""Write the prompt sets that are made from templates: `python -m alignkit.data.prompt_sets.build`.

The output is deterministic.
"""

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
"""Colours, shapes, materials, textures. Both attributes of a prompt are of one kind, so they could be swapped."""
NUMBERS = _words("two three four five six")
PLACES = ("to the left of", "to the right of", "above", "below", "next to")


def build() -> dict[str, list[str]]:
    """Return the prompts of each set by its name."""
    out = {}
    for suffix, things, plurals, count in (
        ("", THINGS, PLURALS, 300),
        ("_held_out", HELD_OUT_THINGS, HELD_OUT_PLURALS, 60),
    ):
        rng = Random(0)
        out[f"attributes{suffix}"] = attributes(things, count, rng)
        out[f"counting{suffix}"] = counting(plurals, count, rng)
        out[f"spatial{suffix}"] = spatial(things, count, rng)
    return out


def attributes(things: Sequence[str], count: int, rng: Random) -> list[str]:
    """Make prompts such as "a red car and a blue door", equally many for each kind of attribute."""
    found: dict[str, None] = {}
    while len(found) < count:
        kind = ATTRIBUTES[len(found) % len(ATTRIBUTES)]
        (one, other), (first, second) = rng.sample(things, 2), rng.sample(kind, 2)
        found[f"{a(first)} {one} and {a(second)} {other}"] = None
    return list(found)


def counting(plurals: Sequence[str], count: int, rng: Random) -> list[str]:
    """Make prompts such as "three cups" (half of them) and "two cups and four books"."""
    single = [f"{number} {thing}" for number, thing in product(NUMBERS, plurals)]
    found = dict.fromkeys(rng.sample(single, count // 2))
    while len(found) < count:
        (one, other), (first, second) = rng.sample(plurals, 2), rng.choices(NUMBERS, k=2)
        found[f"{first} {one} and {second} {other}"] = None
    return rng.sample(list(found), count)


def spatial(things: Sequence[str], count: int, rng: Random) -> list[str]:
    """Make prompts such as "a cup to the left of an apple", equally many for each place."""
    found: dict[str, None] = {}
    while len(found) < count:
        place = PLACES[len(found) % len(PLACES)]
        one, other = rng.sample(things, 2)
        found[f"{a(one)} {place} {a(other)}"] = None
    return list(found)


def a(word: str) -> str:
    """Put the article before `word`. No word above begins with a vowel letter that is not pronounced as a vowel."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


if __name__ == "__main__":
    for name, prompts in build().items():
        (FOLDER / f"{name}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        print(f"wrote {FOLDER / name}.txt")
