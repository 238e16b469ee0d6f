"""What holds for every source of captioned images and of preference pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.data.sources import Images, Preferences
from alignkit.testing.expect import about, expect, global_rng_untouched

COUNT, FAR = 6, 1_000_000
"""Positions that are read together, and one that a long run comes to."""

Columns = Mapping[str, Any]
Read = Callable[[int, int, int], Columns]


def check_images(source: Images, size: int | None = None) -> None:
    """Raise AssertionError, in one line, for the first promise of `alignkit.data.sources.Images` that is not kept.

    `size` is the height and width in pixels that the source was made for, if that is to be checked. A ConfigError
    passes: a file or an extra is missing.
    """

    def read(start: int, count: int, seed: int) -> Columns:
        images, captions = source.batch(start, count, seed)
        return {"images": images, "captions": captions}

    with about(f"images {type(source).__name__}"):
        _a_stream(read, size)


def check_pairs(source: Preferences, size: int | None = None) -> None:
    """Raise AssertionError, in one line, for the first promise of `alignkit.data.sources.Preferences` that is not
    kept; `size` and ConfigError as for `check_images`."""

    def read(start: int, count: int, seed: int) -> Columns:
        pairs = source.batch(start, count, seed)
        return {"winners": pairs.winners, "losers": pairs.losers, "captions": pairs.captions}

    with about(f"pairs {type(source).__name__}"):
        found = _a_stream(read, size)
        expect(
            found["winners"].shape == found["losers"].shape,
            f"found winners {tuple(found['winners'].shape)} and losers {tuple(found['losers'].shape)}, expected alike",
        )
        for place, (winner, loser) in enumerate(zip(found["winners"], found["losers"], strict=True)):
            expect(not torch.equal(winner, loser), f"at position {place} winner and loser are the same image")
        notes = source.notes
        fine = isinstance(notes, Sequence) and not isinstance(notes, str) and all(isinstance(n, str) for n in notes)
        expect(fine, f"notes: found {notes!r}, expected a list of lines")


def _a_stream(read: Read, size: int | None) -> Columns:
    """Check an endless stream whose items depend on seed and position alone; its first items."""
    with global_rng_untouched("while reading"):
        whole = read(0, COUNT, 0)
    _well_formed(whole, COUNT, size)
    kept = {name: column.clone() if isinstance(column, Tensor) else list(column) for name, column in whole.items()}
    for column in whole.values():
        if isinstance(column, Tensor):
            column.zero_()  # which is the caller's to do
    other = read(0, COUNT, 1)
    _well_formed(read(FAR, 2, 0), 2, size)
    _alike(read(0, COUNT, 0), kept, "the same positions a second time")
    _alike(read(2, COUNT - 2, 0), {name: column[2:] for name, column in kept.items()}, "from the third position on")
    for i in range(COUNT):
        _alike(read(i, 1, 0), {name: column[i : i + 1] for name, column in kept.items()}, f"position {i} alone")
    several = len({caption for caption in kept["captions"]}) > 2
    expect(not (several and _same(other, kept)), "seed 1 gives what seed 0 gives, expected another order")
    return kept


def _well_formed(found: Columns, count: int, size: int | None) -> None:
    for name, column in found.items():
        if name == "captions":
            told = [caption for caption in column if not isinstance(caption, str)]
            expect(len(column) == count, f"found {len(column)} captions at {count} positions, expected one each")
            expect(not told, f"found {told[0] if told else None!r} as a caption, expected a string")
            continue
        expect(isinstance(column, Tensor), f"found {type(column).__name__} as {name}, expected a tensor")
        expect(
            column.dim() == 4 and column.shape[:2] == (count, 3) and column.dtype == torch.float32,
            f"found {name} {column.dtype} of shape {tuple(column.shape)}, expected float32 ({count}, 3, H, W)",
        )
        expect(column.device.type == "cpu", f"found {name} on {column.device}, expected the CPU; the core moves them")
        shape = tuple(column.shape[2:])
        expect(size is None or shape == (size, size), f"found {name} of {shape} pixels, expected {size} x {size}")
        low, high = (float(x) for x in column.aminmax())
        expect(0 <= low <= high <= 1, f"found {name} from {low:.3g} to {high:.3g}, expected values in [0, 1]")


def _same(found: Columns, expected: Columns) -> bool:
    return all(
        torch.equal(column, expected[name]) if isinstance(column, Tensor) else list(column) == expected[name]
        for name, column in found.items()
    )


def _alike(found: Columns, expected: Columns, what: str) -> None:
    expect(_same(found, expected), f"{what}: found other items, expected those that seed and position tell")
