"""Checks of sources of captioned images and of preference pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.data.sources import Images, Preferences
from alignkit.records import Example
from alignkit.testing.expect import about, expect, global_rng_untouched

COUNT, FAR = 6, 1_000_000
"""Number of positions that are read together, and a position that only a long run reaches."""

Columns = Mapping[str, Any]
Read = Callable[[int, int, int], Columns]


def check_images(source: Images, size: int | None = None) -> None:
    """Check `source` against `alignkit.data.sources.Images`; raise AssertionError, in one line, for the first failure.

    `size` is the expected height and width in pixels; None accepts any. A ConfigError is raised as it is: a file or an
    extra is missing.
    """

    def read(start: int, count: int, seed: int) -> Columns:
        images, captions = source.batch(start, count, seed)
        return {"images": images, "captions": captions}

    with about(f"images {type(source).__name__}"):
        _check_stream(read, size)


def check_pairs(source: Preferences, size: int | None = None) -> None:
    """Check `source` against `alignkit.data.sources.Preferences`; raise AssertionError, in one line, for a failure.

    `size` and ConfigError as for `check_images`.
    """

    def read(start: int, count: int, seed: int) -> Columns:
        pairs = source.batch(start, count, seed)
        return {"winners": pairs.winners, "losers": pairs.losers, "captions": pairs.captions}

    with about(f"pairs {type(source).__name__}"):
        found = _check_stream(read, size)
        winners, losers = (tuple(found[name].shape) for name in ("winners", "losers"))
        expect(winners == losers, f"found winners {winners} and losers {losers}, expected equal shapes")
        for place, (winner, loser) in enumerate(zip(found["winners"], found["losers"], strict=True)):
            expect(not torch.equal(winner, loser), f"at position {place} winner and loser are the same image")
        notes = source.notes
        fine = isinstance(notes, Sequence) and not isinstance(notes, str) and all(isinstance(n, str) for n in notes)
        expect(fine, f"notes: found {notes!r}, expected a list of lines")


def _check_stream(read: Read, size: int | None) -> Columns:
    """Check an endless stream whose items depend on seed and position alone; return its first items."""
    with global_rng_untouched("while reading"):
        whole = read(0, COUNT, 0)
    _check_columns(whole, COUNT, size)
    kept = {name: column.clone() if isinstance(column, Tensor) else list(column) for name, column in whole.items()}
    for column in whole.values():
        if isinstance(column, Tensor):
            column.zero_()  # callers may change what they get
    other = read(0, COUNT, 1)
    _check_columns(read(FAR, 2, 0), 2, size)
    _expect_same(read(0, COUNT, 0), kept, "the same positions a second time")
    _expect_same(
        read(2, COUNT - 2, 0), {name: column[2:] for name, column in kept.items()}, "from the third position on"
    )
    for i in range(COUNT):
        _expect_same(read(i, 1, 0), {name: column[i : i + 1] for name, column in kept.items()}, f"position {i} alone")
    several = len({Example.of(caption).text for caption in kept["captions"]}) > 2
    expect(
        not (several and _same(other, kept)),
        "seed 1 gives the items of seed 0 in the same order, expected another order",
    )
    return kept


def _check_columns(found: Columns, count: int, size: int | None) -> None:
    for name, column in found.items():
        if name == "captions":
            kinds, expected = (str | Example, "a string or an Example") if "images" in found else (str, "a string")
            wrong = [caption for caption in column if not isinstance(caption, kinds)]
            expect(len(column) == count, f"found {len(column)} captions at {count} positions, expected one each")
            expect(not wrong, f"found {wrong[0] if wrong else None!r} as a caption, expected {expected}")
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


def _expect_same(found: Columns, expected: Columns, what: str) -> None:
    expect(_same(found, expected), f"{what}: found other items, expected items that depend on seed and position alone")
