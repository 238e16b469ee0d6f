"""Text on images: fonts for characters that the usual one lacks, order of scripts, and gaps where no font helps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image, ImageFont

from alignkit.runs import lettering
from alignkit.runs.grid import draw_grid
from alignkit.runs.lettering import GAP, drawable, wrap, write

CHAR = "\u4e00"
"""A Chinese character, which matplotlib's font lacks; in the font of the tests it is a filled square."""
Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """A function that makes the fonts in the given files those of this computer."""
    caches = (lettering._font, lettering._installed, lettering._open)

    def clear() -> None:
        for cached in caches:
            cached.cache_clear()

    def installed(*paths: Path) -> None:
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(path) for path in paths])
        clear()

    yield installed
    clear()


@pytest.fixture
def square_font(tmp_path: Path) -> Path:
    """A font whose only character is `CHAR`."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 900), (1000, 900), (1000, 0)):
        pen.lineTo(corner)
    pen.closePath()
    glyphs = {".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()}
    builder = FontBuilder(1000)
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap({ord(CHAR): "square"})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Square", "styleName": "Regular"})
    builder.setupPost()
    builder.save(tmp_path / "square.ttf")
    return tmp_path / "square.ttf"


def ink(text: str, room: int = 200) -> np.ndarray[Any, Any]:
    """Return which pixels a text leaves black, or nearly so, on a line of 200."""
    sheet = Image.new("RGB", (200, lettering.LINE), "white")
    write(sheet, 0, 0, text, room)
    return np.asarray(sheet.convert("L")) < 64


def test_a_character_that_the_usual_font_lacks_is_drawn_in_a_font_that_has_it(
    install: Install, square_font: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    install(broken, square_font)
    assert drawable(f"one {CHAR} two") == f"one {CHAR} two"
    assert ink(CHAR)[4:11, 1:9].all() and not ink(CHAR)[:, 12:].any()


def test_a_font_of_images_is_reduced_to_the_line(
    install: Install, square_font: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truetype = ImageFont.truetype

    def one_size(path: str, size: int) -> ImageFont.FreeTypeFont:
        if path == str(square_font) and size != lettering.BITMAP_SIZES[1]:
            raise OSError("invalid pixel size")
        return truetype(path, size)

    install(square_font)
    monkeypatch.setattr(ImageFont, "truetype", one_size)
    assert ink(CHAR)[5:11, 2:9].all() and not ink(CHAR)[:, 12:].any()


def test_text_that_begins_right_to_left_has_its_parts_in_that_order(install: Install, square_font: Path) -> None:
    install(square_font)
    assert ink(f"\u05d0{CHAR}")[4:11, 1:9].all()  # the square is left of the letter alef
    assert not ink(f"a{CHAR}")[4:11, 1:9].all()


def test_a_prompt_that_no_font_can_write_has_gaps_its_number_and_a_note(install: Install) -> None:
    install()
    assert drawable(f"a\n {CHAR}{CHAR} \U0001f415\u200d\U0001f9ba sign") == f"a {GAP} {GAP} sign"
    images = torch.zeros(2, 2, 3, 64, 64, dtype=torch.uint8)
    gaps, whole = (draw_grid(images, ["a", text], ["before", "after"]) for text in (CHAR, f"prompt 2: {GAP}"))
    assert gaps.height == whole.height + lettering.LINE * len(wrap(lettering.GAP_NOTE, gaps.width - 8)) + 4
    assert gaps.crop((0, 0, *whole.size)) == whole


@pytest.mark.parametrize("text", ["a red circle " * 400, "e\u0301" * 3000, "\u05d0" * 5000])
def test_text_is_cut_to_its_room(text: str) -> None:
    found = ink(text, 100)
    assert found[:, 80:100].any() and not found[:, 101:].any()
