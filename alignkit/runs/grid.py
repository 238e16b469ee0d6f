"""Draw a grid of images with prompts, column titles, and captions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alignkit.data.decode import to_uint8
from alignkit.runs.lettering import GAP_NOTE, LINE, drawable, wrap, write

MARGIN = 4
EDGE = 256
"""Largest edge, in pixels, of images in a grid of images that are also kept as files."""
GRID = 8
"""Prompts in the image grids of a run."""


def comparison(
    images: Sequence[Tensor],
    prompts: Sequence[str],
    steps: Sequence[int],
    scores: Sequence[Sequence[Mapping[str, float | None]]] = (),
    names: Sequence[str] = (),
) -> Image.Image:
    """Draw images before training, and those after it if there are any, side by side at each number of steps.

    `images` has one or two entries (P, K, 3, H, W) of P prompts at K numbers of steps; `scores` has for each the
    scores of its P * K images by name of the reward. `names` are those that are shown; by default all without "/".
    """
    words = ("before", "after")[: len(images)]
    columns = [f"{step_words(number)}, {word}" for number in steps for word in words]
    known = dict.fromkeys(name for found in scores for one in found for name in one)
    chosen = [name for name in names or known if name in known and "/" not in name]
    captions: list[list[str]] = []
    for row in range(0, len(prompts) * len(steps), len(steps)) if chosen else ():
        shown = [found[row + place] for place in range(len(steps)) for found in scores]
        captions.append([" | ".join(_score(one.get(name)) for name in chosen) if one else "" for one in shown])
    return draw_grid(
        torch.stack(list(images), dim=2).flatten(1, 2),
        prompts,
        columns,
        captions=captions,
        notes=[f"Under each image: {' | '.join(chosen)}."] if captions else (),
    )


def _score(value: float | None) -> str:
    return "not scored" if value is None or math.isnan(value) else f"{value:.2f}"


def reduced(image: Image.Image) -> Tensor:
    """Return an image as (3, h, w) uint8, larger edges reduced to `EDGE` pixels."""
    small = image.convert("RGB")
    small.thumbnail((EDGE, EDGE))
    return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)


def step_words(steps: int) -> str:
    """Return a number of sampler steps in words: "1 step", "2 steps"."""
    return f"{steps} step{'s' * (steps > 1)}"


def draw_grid(
    images: Tensor,
    prompts: Sequence[str],
    columns: Sequence[str],
    smallest: int = 128,
    captions: Sequence[Sequence[str]] = (),
    notes: Sequence[str] = (),
) -> Image.Image:
    """Draw images (P, M, 3, H, W), uint8 or in [0, 1]: P rows titled with prompts, M columns with their names.

    A name may have several lines. `captions`, P of M each, stand under the images, and `notes` under all of them, one
    paragraph each. What is too long for its place is cut; notes are wrapped. Characters that no font of this computer
    has are shown as "[..]", with the number of the prompt from 1, and a note. Images smaller than `smallest` pixels are
    enlarged by an integer factor without smoothing.
    """
    if images.is_floating_point():
        images = to_uint8(images)
    array = images.permute(0, 1, 3, 4, 2).cpu().numpy()
    factor = max(1, math.ceil(smallest / array.shape[3]))
    height, width = array.shape[2] * factor, array.shape[3] * factor
    titles = [name.split("\n") for name in columns]
    sheet_width = MARGIN + len(columns) * (width + MARGIN)
    header = LINE * max(map(len, titles), default=1)
    row_height = LINE + height + LINE * bool(captions) + MARGIN
    shown = [drawable(prompt) for prompt in prompts]
    gaps = [text != " ".join(prompt.split()) for text, prompt in zip(shown, prompts, strict=True)]
    notes = [*notes, *([GAP_NOTE] if any(gaps) else [])]
    footer = [line for note in notes for line in wrap(note, sheet_width - 2 * MARGIN)]
    bottom = header + len(prompts) * row_height
    sheet = Image.new("RGB", (sheet_width, bottom + LINE * len(footer) + MARGIN * bool(footer)), "white")
    lefts = [MARGIN + column * (width + MARGIN) for column in range(len(columns))]
    for left, lines in zip(lefts, titles, strict=True):
        for place, line in enumerate(lines):
            write(sheet, left, place * LINE, line, width)
    for row, text in enumerate(shown):
        top = header + row * row_height
        # The number names a prompt whose text is not all there.
        title = f"prompt {row + 1}: {text}" if gaps[row] else text
        write(sheet, MARGIN, top, title, sheet_width - 2 * MARGIN)
        for column, left in enumerate(lefts):
            image = Image.fromarray(array[row, column]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(image, (left, top + LINE))
            if captions:
                write(sheet, left, top + LINE + height, captions[row][column], width)
    for place, line in enumerate(footer):
        write(sheet, MARGIN, bottom + place * LINE, line, sheet_width - 2 * MARGIN)
    return sheet
