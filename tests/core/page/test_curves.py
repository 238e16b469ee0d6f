from __future__ import annotations

import re
from collections.abc import Callable
from xml.etree import ElementTree

import numpy as np
import pytest

from alignkit.page.curves import BINS, PREFIX, Series, by_steps, over_progress, reduced, trail
from alignkit.page.record import AXES, Array

RANGES = {"updates": (0.0, 100_000.0), "minutes": (0.0, 50.0)}


def axes(count: int) -> dict[str, Array]:
    return {axis: np.linspace(0, 50 if axis == "minutes" else count, count) for axis in AXES}


def points_of(svg: str) -> int:
    """Return the number of corners of all paths."""
    return sum(len(re.findall("[ML]", path)) for path in re.findall(r' d="([^"]*)"', svg))


def test_a_hundred_thousand_updates_become_a_few_hundred_points() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    found = reduced(axes(100_000), values, 0)
    assert found is not None
    one, window = found
    assert len(one.y) <= BINS and window > 1000
    assert one.low is not None and one.high is not None
    assert one.low.min() == values.min() and one.high.max() == values.max()
    svg = over_progress([one], RANGES)
    assert points_of(svg) < 5 * BINS * len(RANGES) and len(svg) < 60_000


def test_a_short_metric_keeps_its_values_and_has_no_mean() -> None:
    found = reduced(axes(5), np.array([1.0, np.nan, 3.0, np.inf, 5.0]), 2)
    assert found is not None
    one, window = found
    assert one.y.tolist() == [1, 3, 5] and window == 1 and one.low is None
    assert one.x["updates"].tolist() == axes(5)["updates"][[0, 2, 4]].tolist()


def test_a_running_mean_weighs_every_update_alike() -> None:
    values = np.arange(1000.0)
    found = reduced(axes(1000), values, 0)
    assert found is not None
    one, window = found
    middle = len(one.y) // 2
    start = middle * 7 - (window - 7) // 2
    assert one.y[middle] == pytest.approx(values[start : start + window].mean())


@pytest.mark.parametrize("values", [[], [np.nan, np.nan]])
def test_a_metric_without_a_value_has_no_curve(values: list[float]) -> None:
    assert reduced(axes(len(values)), np.array(values), 0) is None


def test_each_axis_has_its_own_curve_and_numbers() -> None:
    one = Series(0, axes(10), np.arange(10.0), dotted=True, base=0.0)
    svg = over_progress([one], {"updates": (0.0, 10.0), "minutes": (0.0, 50.0)}, {"updates": 5.0, "minutes": 25.0})
    texts = {
        axis: {"".join(text.itertext()) for group in ElementTree.fromstring(strict(svg)).iter()
               if group.get("class") == axis for text in group.iter() if text.tag.endswith("text")}
        for axis in AXES
    }  # fmt: skip
    assert {"10", "updates"} <= texts["updates"] and {"50", "minutes"} <= texts["minutes"] and not texts["samples"]


def strict(svg: str) -> str:
    """Return an SVG element of an HTML page as XML."""
    return svg.replace(
        "<svg ", '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" ', 1
    )


@pytest.mark.parametrize(
    "draw",
    [
        lambda: over_progress([Series(1, axes(3), np.array([1.0, 1.0, 1.0]))], RANGES),
        lambda: over_progress([Series(1, axes(1), np.array([1e30]))], {"updates": (0.0, 1.0)}),
        lambda: by_steps([(7, {1: (0.5, 0.4, 0.6), 4: (0.6, 0.5, 0.7)}), (0, {4: (0.6, 0.5, 0.7)})]),
        lambda: trail([(0, np.array([0.0, 0.1]), np.array([0.5, 0.6]))], "change of pixels"),
    ],
)
def test_a_chart_is_well_formed_and_takes_its_colours_from_the_page(draw: Callable[[], str]) -> None:
    svg = draw()
    root = ElementTree.fromstring(strict(svg))
    assert root.get("viewBox") and root.get("width") is None
    assert not re.search(r"#[0-9a-f]{6}\b", svg) and "var(--c" in svg and "var(--line)" in svg
    assert "http" not in svg and "<style" not in svg and "font-family" not in svg
    named = set(re.findall(r' id="([^"]+)"', svg))
    assert set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg)) <= named


def test_all_names_of_a_chart_begin_with_the_prefix_that_a_page_replaces() -> None:
    svg = over_progress([Series(0, axes(3), np.arange(3.0), dotted=True)], RANGES)
    names = re.findall(r' id="([^"]+)"', svg)
    assert names and all(name.startswith(PREFIX) for name in names)


def test_settings_of_the_users_matplotlib_neither_count_nor_change(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    one = Series(0, axes(3), np.arange(3.0))
    expected = over_progress([one], RANGES)
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "path")
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30.0)
    assert over_progress([one], RANGES) == expected
    assert matplotlib.rcParams["font.size"] == 30.0
