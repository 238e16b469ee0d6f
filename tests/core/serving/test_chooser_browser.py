"""The page of two images in a real browser; skipped where there is none."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from alignkit.records import Example
from alignkit.serving.answers import Answers, Pair
from alignkit.serving.chooser import Chooser
from browser_fixtures import click
from page_fixtures import EVIL
from servers import running, solid

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
LEFT, RIGHT, DOWN = "\ue012", "\ue014", "\ue015"


def until(browser: Any, script: str) -> None:
    """Wait until a JavaScript expression is true."""
    end = time.monotonic() + 30
    while not browser.execute_script(f"return {script}"):
        assert time.monotonic() < end, f"{script}: {browser.find_element('tag name', 'body').text}"
        time.sleep(0.02)


def press(browser: Any, key: str) -> None:
    until(browser, "!busy")
    browser.find_element("tag name", "body").send_keys(key)
    until(browser, "!busy")


def answers(folder: Path) -> list[str]:
    return [json.loads(line)["answer"] for line in (folder / "pairs.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """The browser on the page about one pair for each hostile text."""
    examples = [Example("a red circle"), *map(Example, EVIL[:-1]), Example("the last")]
    kept = Answers(tmp_path, {}, len(examples))
    plan = [Pair(prompt, 0) for prompt in range(len(examples))]
    server = Chooser(0, kept, examples, plan, command="alignkit train --set data.pairs=choices")
    server.generate(solid)
    with running(server):
        browser.get(server.url)
        until(browser, "!busy")
        yield browser


def test_clicks_and_keys_answer_and_the_end_names_the_next_command(page: Any, tmp_path: Path) -> None:
    assert page.find_element("id", "prompt").text == "a red circle"
    assert page.find_element("id", "place").text == "1 of 10"
    click(page, "[data-answer=right]")
    until(page, "!busy")
    for key in (LEFT, RIGHT, DOWN, "t", "S"):
        press(page, key)
    assert answers(tmp_path) == ["right", "left", "right", "tie", "tie", "skip"]
    assert page.find_element("id", "summary").text == "3 pairs, 2 ties, 1 skipped"
    press(page, "u")
    press(page, "u")
    click(page, "[data-answer=tie]")
    until(page, "!busy")
    for key in (LEFT, "x", "u", LEFT, LEFT, RIGHT, RIGHT, RIGHT, RIGHT):  # x is no key; the last ones come too late
        press(page, key)
    assert answers(tmp_path)[4:] == ["tie", "left", "left", "right", "right", "right"]
    assert not page.find_element("id", "question").is_displayed()
    assert page.find_element("id", "place").text == "10 of 10"
    assert page.find_element("id", "result").text == "8 pairs, 2 ties"
    assert page.find_element("id", "command").text == "alignkit train --set data.pairs=choices"
    click(page, "#undo")
    until(page, "!busy")
    assert page.find_element("id", "place").text == "10 of 10" and page.find_element("id", "question").is_displayed()
    assert len(answers(tmp_path)) == 9 and page.get_log("browser") == []


@pytest.mark.parametrize(("width", "height"), [(1200, 800), (390, 800)])
def test_hostile_text_runs_nothing_and_everything_fits_the_screen(page: Any, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        for text in ["a red circle", *EVIL[:-1]]:
            assert page.find_element("id", "prompt").get_attribute("textContent") == text
            assert page.execute_script(
                "const root = document.documentElement;"
                "return root.scrollWidth <= innerWidth && root.scrollHeight <= innerHeight"
            )
            left, right = (page.find_element("id", side).rect for side in ("left", "right"))
            assert left["width"] == right["width"] == left["height"] > (400 if width > height else 200)
            assert (left["y"] == right["y"]) == (width > height)
            press(page, "s")
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert page.title == "Which image is better? - alignkit" and page.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_has_a_light_and_a_dark_scheme(page: Any, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    back = page.find_element("tag name", "body").value_of_css_property("background-color")
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert back == {"light": "rgba(246, 246, 243, 1)", "dark": "rgba(19, 21, 24, 1)"}[scheme]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12, in a process with threads
def test_a_killed_process_loses_no_answer_and_the_open_page_goes_on(browser: Any, tmp_path: Path) -> None:
    def opened(port: int = 0) -> Chooser:
        return Chooser(port, Answers(tmp_path, {}, 4), [Example("a red circle")] * 4, [Pair(n, 0) for n in range(4)])

    def serve(server: Chooser) -> None:
        server.generate(solid)
        server.serve_forever()

    with opened() as server:
        process = get_context("fork").Process(target=serve, args=(server,), daemon=True)
        process.start()
    browser.get(server.url)
    until(browser, "!busy")
    press(browser, LEFT)
    press(browser, "t")
    assert browser.get_log("browser") == []
    third = browser.find_element("id", "left").get_attribute("src")
    process.kill()
    process.join()
    assert answers(tmp_path) == ["left", "tie"]
    browser.find_element("tag name", "body").send_keys(RIGHT)
    until(browser, "document.getElementById('notice').textContent.includes('does not respond')")
    again = opened(server.server_address[1])
    again.generate(solid)
    with running(again):
        until(browser, "!busy")
        assert browser.find_element("id", "place").text == "3 of 4"
        assert browser.find_element("id", "left").get_attribute("src") == third
        press(browser, RIGHT)
        press(browser, "s")
        assert browser.find_element("id", "result").text == "2 pairs, 1 tie, 1 skipped"
        assert answers(tmp_path) == ["left", "tie", "right", "skip"]
