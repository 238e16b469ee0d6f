"""Stage 0: the prompts. Some coloured shapes and all spatial relations are held out from the training prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from alignkit_shapes.scenes import COLORS, RELATIONS, SHAPES, Thing, join, sample_things

HELD_OUT = {(shape, list(COLORS)[(3 * i + 1) % len(COLORS)]) for i, shape in enumerate(SHAPES)}
"""One colour of each shape that no training prompt names."""


def _held_out(things: list[Thing]) -> bool:
    return any((t.shape, t.color) in HELD_OUT for t in things)


def write(folder: Path, train: int = 400, held_out: int = 200, test: int = 400, seed: int = 7) -> None:
    """Write `train.txt`, `held_out.txt` and `test.txt`.

    Prompts of `train.txt` name no held-out thing; those of the other two name at least one, some with a spatial
    relation. `held_out.txt` is for evaluation and selection during development, `test.txt` for the final evaluation.
    Three of four sampled prompts name two things, the others three; all prompts are distinct.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    trained = _distinct(rng, train, False)
    others = _distinct(rng, held_out + test, True)
    for name, lines in (("train", trained), ("held_out", others[:held_out]), ("test", others[held_out:])):
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _distinct(rng: np.random.Generator, count: int, held_out: bool) -> list[str]:
    """Sample `count` distinct prompts, with held-out things if `held_out`, or else without."""
    lines: dict[str, None] = {}
    while len(lines) < count:
        things = sample_things(2 if rng.random() < 0.75 else 3, rng)
        if _held_out(things) != held_out:
            continue
        phrases = [t.phrase for t in things]
        spatial = held_out and len(things) == 2 and rng.random() < 0.5
        lines[f"{phrases[0]} {rng.choice(RELATIONS)} {phrases[1]}" if spatial else join(phrases)] = None
    return list(lines)
