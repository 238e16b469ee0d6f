"""Training data of the VQA model: drawings, some of them corrupted, and questions about them with true answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from alignkit_shapes.scenes import COLORS, SHAPES, SIZE, Scene, mask

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _warped(outline: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Warp a mask (SIZE, SIZE) with a smooth random field of `strength` pixels."""
    field = ndimage.gaussian_filter(rng.standard_normal((2, SIZE, SIZE)), (0, 5, 5))
    coordinates = np.mgrid[:SIZE, :SIZE] + strength * field / field.std()
    warped: np.ndarray = ndimage.map_coordinates(outline, coordinates, order=1)
    return warped


def _blended(first: np.ndarray, second: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a mask about halfway between two masks."""
    share = rng.uniform(0.4, 0.6)
    soft = ndimage.gaussian_filter(share * first + (1 - share) * second, 2.0)
    halfway: np.ndarray = np.clip((soft - 0.5) * 6 + 0.5, 0, 1)
    return halfway


def corrupted(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, Scene, list[str]]:
    """Draw the scene with errors of few-step models: outlines melted or between two shapes, and mixed colours.

    Returns the image, uint8 (SIZE, SIZE, 3); the scene that is left, in which things of mixed colour have the colour
    ""; and the shapes that are no longer recognisable.
    """
    image: np.ndarray = np.empty((SIZE, SIZE, 3))
    image[:] = scene.ground
    kept, gone = [], []
    for thing in scene.things:
        outline = np.asarray(mask(thing.shape, thing.x, thing.y, thing.radius), np.float32) / 255
        paint = np.broadcast_to(np.array(COLORS[thing.color], np.float32), image.shape)
        color, u = thing.color, rng.random()
        if u < 0.2:
            outline = _warped(outline, rng.uniform(2.5, 4.5), rng)
        elif u < 0.35:
            other = str(rng.choice([s for s in SHAPES if s != thing.shape]))
            outline = _blended(outline, np.asarray(mask(other, thing.x, thing.y, thing.radius), np.float32) / 255, rng)
        elif u < 0.6:
            other = str(rng.choice([c for c in COLORS if c != thing.color]))
            angle = rng.uniform(0, 2 * np.pi)
            y, x = np.mgrid[:SIZE, :SIZE]
            along = ((x - thing.x) * np.cos(angle) + (y - thing.y) * np.sin(angle)) / thing.radius
            share = np.clip(0.5 + along * rng.uniform(0.5, 2), 0, 1)[..., None]
            paint, color = share * paint + (1 - share) * np.array(COLORS[other], np.float32), ""
        if u < 0.35:
            gone.append(thing.shape)
        else:
            kept.append(replace(thing, color=color))
        image = outline[..., None] * paint + (1 - outline[..., None]) * image
    return image.round().astype(np.uint8), Scene(tuple(kept), scene.ground), gone


def pixels(images: list[np.ndarray], rng: np.random.Generator, rough: float = 0.5) -> torch.Tensor:
    """Normalise images for BLIP; a share `rough` gets blur and noise like a decoder's output, to cover samples too."""
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    roughened = torch.from_numpy(rng.random(len(images)) < rough)
    width = float(rng.uniform(0.3, 1.1))
    taps = torch.exp(-((torch.arange(-2, 3).float() / width) ** 2) / 2)
    taps = taps / taps.sum()
    kernel = (taps[:, None] * taps[None, :]).expand(3, 1, 5, 5)
    soft = F.conv2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)
    noise = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32)) * float(rng.uniform(0, 0.05))
    x = torch.where(roughened[:, None, None, None], (soft + noise).clamp(0, 1), x)
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def labels(scene: Scene) -> np.ndarray:
    """Return presence labels, 0 or 1: first of the shapes, then of the coloured shapes."""
    shapes, colors = list(SHAPES), list(COLORS)
    out = np.zeros(len(shapes) * (1 + len(colors)), dtype=np.float32)
    for thing in scene.things:
        place = shapes.index(thing.shape)
        out[place] = 1
        out[len(shapes) + place * len(colors) + colors.index(thing.color)] = 1
    return out


def question(scene: Scene, rng: np.random.Generator, colors: bool = True, gone: Sequence[str] = ()) -> tuple[str, bool]:
    """Return a question and its true answer, yes as often as no; a wrong colour is mostly that of another thing.

    `gone` are shapes that are no longer recognisable; questions about absent shapes are mostly about them.
    """
    present = {t.shape: t for t in scene.things}
    clear = [t for t in scene.things if t.color]
    truth = bool(rng.random() < 0.5) and bool(present)
    absent = [s for s in SHAPES if s not in present]
    if gone and rng.random() < 0.7:
        absent = list(gone)
    if not colors or rng.random() < 0.35 or (truth and not clear):
        shape = str(rng.choice(list(present) if truth else absent))
        return f"is there {'an' if shape[0] in 'aeiou' else 'a'} {shape}?", truth
    if not truth and (not present or rng.random() < (0.5 if gone else 0.2)):
        return f"is the {rng.choice(absent)} {rng.choice(list(COLORS))}?", False
    if truth:
        thing = clear[int(rng.integers(len(clear)))]
        return f"is the {thing.shape} {thing.color}?", True
    thing = present[str(rng.choice(list(present)))]
    others = [t.color for t in clear if t.color != thing.color]
    if not others or rng.random() < 0.4:
        others = [c for c in COLORS if c != thing.color]
    return f"is the {thing.shape} {rng.choice(others)}?", False
