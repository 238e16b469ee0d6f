"""Write text onto images, each character in a font of this computer that has it."""

from __future__ import annotations

import math
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import regex
from PIL import Image, ImageDraw, ImageFont, features

if TYPE_CHECKING:
    from matplotlib.ft2font import FT2Font

SIZE = 11
LINE = 18
"""Pixels from one line to the next."""
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
GAP = "[..]"
"""Stands for characters that cannot be drawn."""
GAP_NOTE = (
    f"{GAP} stands for characters that cannot be drawn on this computer: no font here has them (Noto Sans CJK and Noto "
    "Color Emoji have most), or they run from right to left and Pillow has no Raqm."
)
BITMAP_SIZES = (109, 160, 136, 128, 96, 64)
"""Sizes to try of fonts of images, such as those of emoji, which have one size or few."""
UNUSUAL = ("bold", "italic", "oblique", "black", "light", "thin", "mono", "condensed", "narrow", "serif")
BOXES = ("lastresort", "adobeblank")
"""Names of fonts that have every character, as a box or as nothing."""


@dataclass(frozen=True)
class _Font:
    face: ImageFont.FreeTypeFont
    table: FT2Font

    @property
    def scale(self) -> float:
        """Pixels drawn for each pixel of the font."""
        return SIZE / self.face.size

    def has(self, cluster: str) -> bool:
        return all(self.table.get_char_index(ord(char)) for char in cluster if not _invisible(char))

    def length(self, text: str) -> float:
        return self.face.getlength(text) * self.scale


def write(sheet: Image.Image, left: int, top: int, text: str, room: int) -> None:
    """Write a text, black, into the line of `sheet` that begins at (left, top), cut to `room` pixels."""
    pen, baseline, place = ImageDraw.Draw(sheet), top + 2 + _base().face.getmetrics()[0], float(left)
    for font, part in _pieces(_cut(drawable(text), room)):
        if font.scale == 1:
            pen.text((place, baseline), part, fill="black", font=font.face, anchor="ls")
        else:
            width, (ascent, descent) = math.ceil(font.face.getlength(part)), font.face.getmetrics()
            large = Image.new("RGBA", (width, ascent + descent), (255, 255, 255, 0))
            ImageDraw.Draw(large).text((0, ascent), part, "black", font.face, anchor="ls", embedded_color=True)
            small = large.resize([max(1, round(edge * font.scale)) for edge in large.size], Image.Resampling.LANCZOS)
            sheet.paste(small, (round(place), baseline - round(ascent * font.scale)), small)
        place += font.length(part)


def drawable(text: str) -> str:
    """Return the text in one line, with `GAP` in place of characters that cannot be drawn."""
    runs = groupby(_clusters(" ".join(text.split())), key=lambda cluster: _font(cluster) is None)
    return "".join(GAP if missing else "".join(run) for missing, run in runs)


def wrap(text: str, room: int) -> list[str]:
    """Split a text into lines of at most `room` pixels, as far as its words allow."""
    lines = [""]
    for word in drawable(text).split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _length(longer) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _cut(text: str, room: int) -> str:
    """Return the text, its end replaced by an ellipsis if it is longer than `room` pixels."""
    if _length(text) <= room:
        return text
    clusters = _clusters(text[: 4 * room])  # a text of any length takes little time
    lengths = range(len(clusters))
    too_long = bisect_right(lengths, room, key=lambda n: math.ceil(_length("".join(clusters[:n]) + ELLIPSIS)))
    return "".join(clusters[: max(0, too_long - 1)]) + ELLIPSIS


def _clusters(text: str) -> list[str]:
    """Split a text into what is drawn as one: a letter with its accents, an emoji with its joined parts."""
    return list(regex.findall(r"\X", text))


def _length(text: str) -> float:
    return sum(font.length(part) for font, part in _pieces(text))


def _pieces(text: str) -> list[tuple[_Font, str]]:
    """Split a text into parts of one font, from left to right."""
    runs = groupby(_clusters(text), key=_font)
    found = [(font, "".join(run)) for font, run in runs if font is not None]
    directions = (unicodedata.bidirectional(char) for char in text)
    first = next((direction for direction in directions if direction in ("L", "R", "AL")), "L")
    return found if first == "L" else found[::-1]


@cache
def _font(cluster: str) -> _Font | None:
    """Return the first font that has all characters of a cluster, None if there is none."""
    if not features.check_feature("raqm") and any(unicodedata.bidirectional(char) in ("R", "AL") for char in cluster):
        return None
    return next((font for font in _fonts() if font.has(cluster)), None)


def _fonts() -> Iterator[_Font]:
    yield _base()
    for path in _installed():
        if (font := _open(path)) is not None:
            yield font


@cache
def _base() -> _Font:
    """Return matplotlib's font, which has Latin, Greek, Cyrillic, Arabic and Hebrew letters."""
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    path = str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    return _Font(ImageFont.truetype(path, SIZE), FT2Font(path))


@cache
def _installed() -> list[str]:
    """Return the files of this computer's fonts, plain ones first."""
    from matplotlib import font_manager

    paths = [path for path in font_manager.findSystemFonts() if not any(name in path.lower() for name in BOXES)]
    return sorted(paths, key=lambda path: (any(word in Path(path).stem.lower() for word in UNUSUAL), path))


@cache
def _open(path: str) -> _Font | None:
    """Open a font, at `SIZE` or the first of `BITMAP_SIZES` that it has; None if it cannot be read."""
    from matplotlib.ft2font import FT2Font

    for size in (SIZE, *BITMAP_SIZES):
        try:
            return _Font(ImageFont.truetype(path, size), FT2Font(path))
        except (OSError, RuntimeError, ValueError):  # this size is missing, or the file is no font
            continue
    return None


def _invisible(char: str) -> bool:
    """Whether a character needs no glyph: joiners, marks of direction, selectors of a variant, spaces."""
    return unicodedata.category(char) in ("Cf", "Zs") or 0xFE00 <= ord(char) <= 0xFE0F
