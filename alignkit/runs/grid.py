"""Draw a grid of images with prompts and column titles."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from alignkit.data.decode import to_uint8


def draw_grid(images: Tensor, prompts: Sequence[str], columns: Sequence[str], smallest: int = 128) -> Image.Image:
    """Draw images (P, M, 3, H, W), uint8 or in [0, 1]: P rows titled with prompts, M columns with their names.

    Images smaller than `smallest` pixels are enlarged by an integer factor without smoothing.
    """
    if images.is_floating_point():
        images = to_uint8(images)
    array = images.permute(0, 1, 3, 4, 2).cpu().numpy()
    factor = max(1, math.ceil(smallest / array.shape[3]))
    height, width = array.shape[2] * factor, array.shape[3] * factor
    margin, caption, font = 4, 18, ImageFont.load_default(12)
    size = (margin + len(columns) * (width + margin), caption + len(prompts) * (caption + height + margin))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)

    def write(left: int, top: int, text: str, room: int) -> None:
        text = " ".join(text.split())
        if pen.textlength(text, font) > room:
            too_long = bisect_right(
                range(len(text)), room, key=lambda n: math.ceil(pen.textlength(text[:n] + "...", font))
            )
            text = text[: max(0, too_long - 1)] + "..."
        pen.text((left, top + 2), text, fill="black", font=font)

    for column, name in enumerate(columns):
        write(margin + column * (width + margin), 0, name, width)
    for row, prompt in enumerate(prompts):
        top = caption + row * (caption + height + margin)
        write(margin, top, prompt, size[0] - 2 * margin)
        for column in range(len(columns)):
            image = Image.fromarray(array[row, column]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(image, (margin + column * (width + margin), top + caption))
    return sheet
