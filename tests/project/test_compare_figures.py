"""The figures of the docs show what benchmarks/results holds."""

from __future__ import annotations

import importlib
import re
import sys
from html import unescape
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest

from docs_fixtures import generator

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
NAMES = sorted(path.relative_to(IMAGES).with_suffix("").as_posix() for path in IMAGES.rglob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return importlib.import_module("compare_figures")


def words(svg: str) -> list[str]:
    """Return what a figure says in words, a line for each interval."""
    return (ElementTree.fromstring(svg).findtext(f"{SVG}desc") or "").strip().splitlines()


def test_there_is_a_figure_for_every_table_and_every_algorithm_of_one() -> None:
    assert sorted(generator().figures()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_is_what_the_results_give(name: str) -> None:
    kept = (IMAGES / f"{name}.svg").read_text(encoding="utf-8")
    drawn = generator().figures()[name]()
    assert words(drawn) == words(kept), "run `make docs`"
    # Another version of matplotlib may write the same picture in other words.
    if f"matplotlib=={matplotlib.__version__}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8"):
        assert drawn == kept, "run `make docs`"


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("results/") and "eight" not in name])
def test_a_figure_has_the_numbers_of_the_tables(name: str) -> None:
    pages = "".join(
        (ROOT / "docs" / page).read_text(encoding="utf-8") for page in ("results.md", "results_appendix.md")
    )
    lines = words((IMAGES / f"{name}.svg").read_text(encoding="utf-8"))
    assert len(lines) > 10
    for line in lines:
        method, numbers = line.partition(", ")[0], line.rpartition(": ")[2]
        assert re.search(rf"^\| {re.escape(method)}.*{re.escape(f'({numbers})')}", pages, re.MULTILINE), line


def test_markers_are_filled_where_the_interval_excludes_0(figures: ModuleType) -> None:
    rows = {"a & <b>": ({1: (0.2, 0.1, 0.3)}, {1: (0.2, -0.1, 0.5)})}
    svg = figures.draw([figures.Block("Title", ("left", "right"), rows)], "About < these")
    root = ElementTree.fromstring(svg)
    assert root.findtext(f"{SVG}title") == "About < these"
    assert words(svg) == [
        "Title: a & <b>, left, 1 step: +0.200 [+0.100, +0.300]",
        "Title: a & <b>, right, 1 step: +0.200 [-0.100, +0.500]",
    ]
    filled = [use.get("style", "") for use in root.iter(f"{SVG}use") if "var(--c0)" in use.get("style", "")]
    assert ["fill: var(--card)" in style for style in filled] == [False, False, True]  # first, that of the legend
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"left", "right", "Title", "a & <b>", "1 step"} <= set(texts)
    light, dark = re.findall(r":root \{(.*?)\}", unescape(svg))
    assert light != dark and {"--c0", "--c7", "--ink2", "--line", "--card"} <= set(re.findall(r"--\w+", light))
    assert set(re.findall(r"--\w+", light)) == set(re.findall(r"--\w+", dark)) >= set(re.findall(r"var\((--\w+)", svg))


def test_curves_show_the_points_of_every_row_that_has_some(
    figures: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, tables = importlib.import_module("compare_curves"), importlib.import_module("compare_tables")
    small = tables.Table("small", "Small", "none", {}, (1, 2), 20, (1e-4,), {"DDPO": tables.Method("ddpo", "samples")})
    monkeypatch.setattr(module, "TABLES", {"small": small})

    def run(seed: int, rise: float) -> dict[str, Any]:
        points = [
            {"samples": 10 * i, "minutes": i / 2,
             "values": {k: {"trained": 0.5 + i * rise, "pixel_check": 0.25} for k in ("1", "2")}}
            for i in range(3)
        ]  # fmt: skip
        return {"table": "small", "method": "DDPO", "rate": 1e-4, "seed": seed, "tuning": False, "points": points}

    results = {f"run-{seed}-20": run(seed, seed / 10) for seed in (1, 2)}
    (row,) = module.of_algorithm(results, "ddpo")
    assert row.over("minutes") == [0.0, 0.5, 1.0]
    assert row.values("trained", 1)[2] == pytest.approx((0.8, 0.7, 0.9))
    svg = module.draw([row], "ddpo")
    assert words(svg)[0] == (
        "Small: DDPO, trained reward, 1 step: 0.500 at 0 samples, 0.650 at 10 samples, 0.800 at 20 samples"
    )
    texts = {text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")}
    assert {"Small: DDPO", "trained reward, over samples", "pixel check, held out, over minutes", "2 steps"} <= texts
    del results["run-1-20"]["points"], results["run-2-20"]["points"]
    assert module.of_algorithm(results, "ddpo") == []


def test_every_image_stands_on_a_page() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    missing = [p.name for p in IMAGES.rglob("*.*") if f"images/{p.relative_to(IMAGES).as_posix()}" not in pages]
    assert missing == []
