"""The curves of a run as one SVG."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from alignkit.errors import AlignkitError
from alignkit.page.plot import Plot, plot
from alignkit.page.record import read_record
from page_fixtures import EVIL, SETTINGS, Write, update_line, write_lines


def plotted(folder: Path, *metrics: str, against: str = "updates") -> Plot:
    return plot(read_record(folder), metrics, against)


def texts(svg: str) -> list[str]:
    found = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return [element.text or "" for element in found]


def test_rewards_at_the_points_and_the_main_metrics_are_plotted(write_run: Write) -> None:
    found = plotted(write_run())
    assert [chart.title for chart in found.charts] == ["shine", "pixels", "reward", "loss", "grad_norm"]
    assert {"shine", "held-out, at the points", "1 step", "2 steps", "updates"} <= set(texts(found.svg))
    assert "minutes" not in texts(found.svg) and "var(" not in found.svg
    assert repr(found) == "Plot(shine, pixels, reward, loss, grad_norm)"


def test_metrics_can_be_named_and_plotted_against_time(write_run: Write) -> None:
    found = plotted(write_run(), "loss", "reward/part", against="minutes")
    assert [chart.title for chart in found.charts] == ["loss", "reward/part"]
    assert "minutes" in texts(found.svg) and "updates" not in texts(found.svg)


def test_ids_of_one_chart_are_not_those_of_another(write_run: Write) -> None:
    ids = re.findall(r' id="([^"]+)"', plotted(write_run()).svg)
    assert ids and len(ids) == len(set(ids))


def test_a_name_or_axis_that_is_not_there_is_refused(write_run: Write, tmp_path: Path) -> None:
    folder = write_run()
    with pytest.raises(AlignkitError, match=r"found 'grad', expected one of reward, loss.*; did you mean grad_norm"):
        plotted(folder, "grad")
    with pytest.raises(AlignkitError, match="found against='hours', expected one of updates, samples, minutes"):
        plotted(folder, against="hours")
    write_lines(folder, [{"step": 0, "warning": "odd"}])
    with pytest.raises(AlignkitError, match="has no update yet"):
        plotted(folder)


def test_names_inject_nothing_and_the_image_is_sound_xml(write_run: Write) -> None:
    names = [*EVIL, "bell \x07"]
    folder = write_run(settings=SETTINGS.replace('"shine"', '"<script>x</script>"'))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    write_lines(folder, [*lines, update_line(41, **dict.fromkeys(names, 1.0))])
    found = plotted(folder, *names)
    root = ElementTree.fromstring(found.svg)
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert tags <= {"svg", "g", "text", "line", "path", "defs", "use", "clipPath", "rect", "title"}
    assert not any(name.startswith("on") for element in root.iter() for name in element.attrib)
    assert any(text.startswith("<script>document.title") for text in texts(found.svg))
    assert "<script>x</script>" in texts(plotted(folder).svg)


def test_a_notebook_shows_the_image_and_a_file_holds_it(write_run: Write, tmp_path: Path) -> None:
    found = plotted(write_run(), "loss")
    match = re.fullmatch(r'<img src="data:image/svg\+xml;base64,([^"]+)" [^<>]*>', found._repr_html_())
    assert match and base64.b64decode(match[1]).decode() == found.svg
    assert found.save(tmp_path / "new" / "curves.svg").read_text(encoding="utf-8") == found.svg
    with pytest.raises(AlignkitError, match=r"found the name curves.png, expected one that ends with .svg"):
        found.save("curves.png")
