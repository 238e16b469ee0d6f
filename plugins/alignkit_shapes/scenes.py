"""The drawing program: coloured shapes on a plain ground, and the captions that describe them.

A scene is one to three things with distinct shapes. Everything here is NumPy and Pillow; all randomness comes from the
`numpy.random.Generator` that the caller passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
"""Edge of a drawing, in pixels."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (250, 225, 50),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "purple": (145, 50, 180),
    "black": (25, 25, 25),
    "white": (250, 250, 250),
}
RADII = (10.0, 12.5)
"""Smallest and largest radius of a thing in pixels."""

RELATIONS = ("left of", "right of", "above", "below")
_OVERSAMPLE = 4
_GAP = 3.0


def _circle(radius: float = 1.0) -> list[tuple[float, float]]:
    return [(radius * math.cos(a), radius * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 48, endpoint=False)]


def _heart() -> list[tuple[float, float]]:
    angles = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    return [
        (
            float(16 * math.sin(a) ** 3 / 16.5),
            float(-(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16.5 - 0.12),
        )
        for a in angles
    ]


_ARM = 0.36
SHAPES: dict[str, list[tuple[float, float]]] = {
    "circle": _circle(),
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -0.95), (1.05, 0.85), (-1.05, 0.85)],
    "cross": [
        (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
        (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
    ],
    "heart": _heart(),
    "diamond": [(0.0, -1.1), (0.8, 0.0), (0.0, 1.1), (-0.8, 0.0)],
    "ring": _circle(),
}  # fmt: skip
"""Outlines in units of the radius, with y pointing down. The ring's hole is cut out by `mask`."""
RING_HOLE = 0.52


@dataclass(frozen=True)
class Thing:
    """One shape of a scene. `x`, `y` and `radius` are in pixels."""

    shape: str
    color: str
    x: float = SIZE / 2
    y: float = SIZE / 2
    radius: float = 0.0

    @property
    def phrase(self) -> str:
        """The noun phrase that names it, such as "a red circle"."""
        return f"{'an' if self.color[0] in 'aeiou' else 'a'} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A ground (grey level, 0..255) and the things on it."""

    things: tuple[Thing, ...]
    ground: tuple[int, int, int] = (170, 170, 170)


def mask(shape: str, x: float, y: float, radius: float) -> Image.Image:
    """Return the coverage of one shape as an 8-bit greyscale image of `SIZE` x `SIZE`."""
    scale = _OVERSAMPLE
    image = Image.new("L", (SIZE * scale, SIZE * scale))
    pen = ImageDraw.Draw(image)
    pen.polygon([((x + px * radius) * scale, (y + py * radius) * scale) for px, py in SHAPES[shape]], fill=255)
    if shape == "ring":
        hole = _circle(RING_HOLE)
        pen.polygon([((x + px * radius) * scale, (y + py * radius) * scale) for px, py in hole], fill=0)
    return image.reduce(scale)


def draw(scene: Scene) -> np.ndarray:
    """Draw the scene as an image, uint8 (SIZE, SIZE, 3)."""
    image = Image.new("RGB", (SIZE, SIZE), scene.ground)
    for thing in scene.things:
        image.paste(COLORS[thing.color], (0, 0), mask(thing.shape, thing.x, thing.y, thing.radius))
    return np.asarray(image)


def _place(radii: list[float], rng: np.random.Generator) -> list[tuple[float, float]]:
    """Return random centres that keep the things inside the image and apart from each other."""
    while True:
        places: list[tuple[float, float]] = []
        for radius in radii:
            for _ in range(24):
                low, high = radius * 1.1 + 1, SIZE - radius * 1.1 - 1
                x, y = rng.uniform(low, high, 2)
                apart = all(
                    max(abs(x - ox), abs(y - oy)) >= 1.06 * (radius + other) + _GAP
                    for (ox, oy), other in zip(places, radii, strict=False)
                )
                if apart:
                    places.append((float(x), float(y)))
                    break
            else:
                break
        if len(places) == len(radii):
            return places


def sample_things(count: int, rng: np.random.Generator) -> list[Thing]:
    """Sample `count` things of distinct shapes and independent colours, without places and radii."""
    shapes = rng.choice(list(SHAPES), size=count, replace=False)
    return [Thing(str(s), str(rng.choice(list(COLORS)))) for s in shapes]


def arrange(things: list[Thing], rng: np.random.Generator) -> Scene:
    """Return a scene of these things at random places on a random grey ground."""
    radii = [float(rng.uniform(*RADII)) for _ in things]
    places = _place(radii, rng)
    level = int(rng.integers(150, 191))
    placed = tuple(Thing(t.shape, t.color, x, y, r) for t, (x, y), r in zip(things, places, radii, strict=True))
    return Scene(placed, (level, level, level))


def sample_scene(rng: np.random.Generator) -> Scene:
    """Sample a scene: one thing with probability .15, two with .6, three with .25."""
    return arrange(sample_things(int(rng.choice([1, 2, 3], p=[0.15, 0.6, 0.25])), rng), rng)


def related(first: Thing, second: Thing) -> str:
    """Return the spatial relation of `first` to `second` along the axis on which they are further apart."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a true caption; with probability .3 the caption of two things states their spatial relation."""
    things = [scene.things[i] for i in rng.permutation(len(scene.things))]
    if len(things) == 2 and rng.random() < 0.3:
        return f"{things[0].phrase} {related(*things)} {things[1].phrase}"
    return join([t.phrase for t in things])


def join(phrases: list[str]) -> str:
    """Join the phrases with commas and "and"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
