"""Check an image of shapes by rules: palette, connected regions, outlines. No network."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

from alignkit_shapes.scenes import COLORS, RADII, SHAPES, SIZE, Thing, mask

GROUND_DISTANCE = 45.0
"""Smallest distance (RGB, 0..255) of a thing's pixels from the ground."""
MIN_AREA = 25
"""Smallest region in pixels; smaller ones are ignored as specks."""
MIN_PURITY = 0.75
"""Share of a thing's inner pixels that must be nearest to one colour of the palette."""
MAX_COLOR_DISTANCE = 75.0
"""Largest distance (RGB, 0..255) of a thing's median colour from that colour."""
MIN_OVERLAP = 0.68
"""Smallest intersection over union with the best outline for which a region has a shape."""
_GRID = 24


@dataclass(frozen=True)
class Region:
    """A connected region of an image. `shape` or `color` is None if it is not clear."""

    shape: str | None
    color: str | None
    x: float
    y: float
    area: int


@cache
def _templates() -> list[tuple[str, np.ndarray]]:
    """Return the mask of each shape, cropped to its bounding box and resampled to a small grid.

    Each shape has three sizes, because fine outlines look different when they cover few pixels.
    """
    return [
        (shape, _boxed(np.asarray(mask(shape, SIZE / 2, SIZE / 2, float(radius))) > 127))
        for shape in SHAPES
        for radius in np.linspace(*RADII, 3)
    ]


def _boxed(region: np.ndarray) -> np.ndarray:
    """Crop a boolean mask to its bounding box, centre it in a square and resample it to the grid."""
    rows, cols = np.nonzero(region.any(1))[0], np.nonzero(region.any(0))[0]
    cut = region[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].astype(np.float32)
    height, width = cut.shape
    edge = max(height, width)
    square = np.zeros((edge, edge), np.float32)
    top, left = (edge - height) // 2, (edge - width) // 2
    square[top : top + height, left : left + width] = cut
    grid: np.ndarray = ndimage.zoom(square, _GRID / edge, order=1, grid_mode=True, mode="nearest") > 0.5
    return grid


def find_regions(image: np.ndarray) -> list[Region]:
    """Return the regions of an image, uint8 (SIZE, SIZE, 3), largest first."""
    pixels = image.astype(np.float32)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(edge, axis=0)
    foreground = np.linalg.norm(pixels - ground, axis=-1) > GROUND_DISTANCE
    labels, count = ndimage.label(foreground, structure=np.ones((3, 3)))
    regions = [_region(labels == i, pixels) for i in range(1, count + 1) if (labels == i).sum() >= MIN_AREA]
    return sorted(regions, key=lambda r: -r.area)


def _region(where: np.ndarray, pixels: np.ndarray) -> Region:
    inner = ndimage.binary_erosion(where)
    values = pixels[inner if inner.sum() >= 6 else where]
    palette = np.array(list(COLORS.values()), np.float32)
    nearest = np.linalg.norm(values[:, None] - palette[None], axis=-1).argmin(1)
    counts = np.bincount(nearest, minlength=len(palette))
    best = int(counts.argmax())
    clear = counts[best] >= MIN_PURITY * len(values)
    close = np.linalg.norm(np.median(values, axis=0) - palette[best]) <= MAX_COLOR_DISTANCE
    box = _boxed(where)
    overlaps = [(box & outline).sum() / (box | outline).sum() for _, outline in _templates()]
    shape, _ = _templates()[int(np.argmax(overlaps))]
    y, x = ndimage.center_of_mass(where)
    return Region(
        shape if max(overlaps) >= MIN_OVERLAP else None,
        list(COLORS)[best] if clear and close else None,
        float(x), float(y), int(where.sum()),
    )  # fmt: skip


def answers(regions: list[Region], things: list[Thing]) -> list[bool]:
    """Answer the questions of attribute binding from the regions.

    Two answers for each thing: whether a region has its shape, and whether a region of that shape has its colour.
    """
    out = []
    for thing in things:
        same = [r for r in regions if r.shape == thing.shape]
        out += [bool(same), any(r.color == thing.color for r in same)]
    return out


def exact(regions: list[Region], things: list[Thing]) -> bool:
    """Whether the image shows these things in their colours and nothing else."""
    return sorted((str(r.shape), str(r.color)) for r in regions) == sorted((t.shape, t.color) for t in things)
