"""Stage 0: the prompts. Some coloured shapes, and all spatial forms, are kept out of the training prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from alignkit_shapes.scenes import COLORS, RELATIONS, SHAPES, Thing, join, sample_things

HELD_OUT = {(shape, list(COLORS)[(3 * i + 1) % len(COLORS)]) for i, shape in enumerate(SHAPES)}
"""One colour of each shape that no training prompt names."""


def _held_out(things: list[Thing]) -> bool:
    return any((t.shape, t.color) in HELD_OUT for t in things)


def write(folder: Path, train: int = 400, held_out: int = 200, seed: int = 7) -> None:
    """`train.txt`: things none of which is held out. `held_out.txt`: at least one held out, some with a relation.

    Three of four prompts drawn name two things, the others three; no prompt comes twice.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, wanted in (("train", train, False), ("held_out", held_out, True)):
        lines: dict[str, None] = {}
        while len(lines) < count:
            things = sample_things(2 if rng.random() < 0.75 else 3, rng)
            if _held_out(things) != wanted:
                continue
            phrases = [t.phrase for t in things]
            spatial = wanted and len(things) == 2 and rng.random() < 0.5
            lines[f"{phrases[0]} {rng.choice(RELATIONS)} {phrases[1]}" if spatial else join(phrases)] = None
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
