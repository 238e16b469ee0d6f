"""The page in a real browser, headless; skipped where there is none."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from alignkit.page.page import write_page
from browser_fixtures import click, eventually
from page_fixtures import EVIL, Write

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


def opened(browser: Any, page: Path) -> Any:
    browser.get(page.as_uri())
    return browser


def style(browser: Any, selector: str, name: str) -> str:
    return str(browser.find_element("css selector", selector).value_of_css_property(name))


def test_an_image_is_enlarged_and_the_slider_moves_between_before_and_after(browser: Any, write_run: Write) -> None:
    opened(browser, write_page([write_run()]))
    assert not browser.find_element("id", "large").is_displayed()
    click(browser, ".card .shot")
    eventually(browser, lambda: browser.find_element("id", "large-prompt").text == "a red circle")
    assert browser.find_element("id", "large").is_displayed()
    assert style(browser, "#large-after", "clip-path") == "inset(0px 0px 0px 50%)"
    before, after = (browser.find_element("id", f"large-{when}") for when in ("before", "after"))
    assert before.size == after.size and before.size["width"] > 200
    assert before.get_attribute("src") != after.get_attribute("src")
    slider = browser.find_element("id", "slider")
    for _ in range(10):
        slider.send_keys("\ue014")  # arrow right
    eventually(browser, lambda: style(browser, "#large-after", "clip-path") == "inset(0px 0px 0px 40%)")
    edge = float(style(browser, "#edge", "left").removesuffix("px"))
    assert edge == pytest.approx(0.4 * before.size["width"], abs=1)
    scores = [row.text for row in browser.find_elements("css selector", "#large-scores tr")]
    assert scores == ["reward 0.500 0.900", "shine 0.500 0.900", "pixels 0.250 0.250"]
    click(browser, "#next")
    eventually(browser, lambda: browser.find_element("id", "large-prompt").text != "a red circle")
    click(browser, "#close")
    eventually(browser, lambda: not browser.find_element("id", "large").is_displayed())
    assert browser.get_log("browser") == []


def test_the_page_can_be_sorted_and_plotted_against_time(browser: Any, write_run: Write) -> None:
    opened(browser, write_page([write_run()]))

    def shown() -> list[str]:
        return [card.text for card in browser.find_elements("css selector", "#cards .prompt") if card.is_displayed()]

    assert shown() == ["a red circle", "a blue square", "a green star"]
    click(browser, "label:has([value=worst])")
    eventually(browser, lambda: shown() == ["a green star", "a blue square", "a red circle"])
    assert style(browser, ".chart .updates", "display") == "inline"
    click(browser, "label:has([value=minutes])")
    eventually(browser, lambda: style(browser, ".chart .updates", "display") == "none")
    assert style(browser, ".chart .minutes", "display") == "inline"
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_has_a_light_and_a_dark_scheme_and_is_not_blank(browser: Any, write_run: Write, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    opened(browser, write_page([write_run()]))
    with Image.open(io.BytesIO(browser.get_screenshot_as_png())) as image:
        colours = image.convert("RGB").getcolors(2**24)
    assert colours is not None and len(colours) > 50
    brightness = sum(max(colours)[1]) / 3
    assert brightness > 200 if scheme == "light" else brightness < 60


def test_hostile_text_runs_nothing_and_keeps_the_layout(browser: Any, write_run: Write, tmp_path: Path) -> None:
    runs = [write_run(prompts=EVIL, warnings=EVIL), write_run("two" * 60, prompts=EVIL, size=300)]
    opened(browser, write_page(runs, tmp_path / "page.html"))
    assert browser.title.startswith("first, two")
    for width in (1200, 400):
        browser.set_window_size(width, 900)
        wide, room = browser.execute_script("return [document.body.scrollWidth, window.innerWidth]")
        assert wide <= room
    browser.set_window_size(1200, 900)
    cards = browser.find_elements("css selector", "#cards .card")
    assert len(cards) == len(EVIL) and max(card.size["height"] for card in cards) < 900
    prompts = {card.find_element("css selector", ".prompt").get_attribute("textContent") for card in cards}
    assert set(EVIL[:-1]) <= prompts
    for card in cards[:3]:
        browser.execute_script("arguments[0].querySelector('.shot').click()", card)
        assert browser.find_element("id", "large").size["height"] <= 900
        click(browser, "#close")
    assert browser.title.startswith("first, two") and browser.get_log("browser") == []


def test_the_page_can_be_read_without_its_script(browser: Any, write_run: Write, tmp_path: Path) -> None:
    page = tmp_path / "plain.html"
    text = write_page([write_run()]).read_text(encoding="utf-8")
    page.write_text(text[: text.index("<script>")], encoding="utf-8")
    opened(browser, page)
    cards = browser.find_elements("css selector", "#cards .card")
    assert len(cards) == 3 and all(card.is_displayed() for card in cards)
    assert style(browser, ".chart .updates", "display") == "inline"
    assert style(browser, ".chart .minutes", "display") == "none"


def test_the_page_prints(browser: Any, write_run: Write) -> None:
    opened(browser, write_page([write_run()]))
    printed = browser.execute_cdp_cmd("Page.printToPDF", {})["data"]
    assert len(printed) > 20_000
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": []})
    assert style(browser, "nav", "display") == "none" and style(browser, ".choice", "display") == "none"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "screen", "features": []})
