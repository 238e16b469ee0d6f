from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from alignkit.errors import AlignkitError
from alignkit.page.facts import spread
from alignkit.page.page import LARGEST, keep_page, render, write_page
from alignkit.page.record import read_record
from page_fixtures import EVIL, SETTINGS, Elements, Write, plain, rows, update_line, write_lines


def page_of(*folders: Path) -> str:
    return render([read_record(folder) for folder in folders])


def test_the_page_lies_in_the_folder_of_the_run_or_where_it_is_wanted(
    write_run: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = write_run("one"), write_run("two")
    assert write_page([one]) == one / "report.html"
    assert write_page([one, two]) == Path("report.html")
    assert write_page([one], tmp_path / "new" / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(AlignkitError, match="found 9 runs, expected at most 8"):
        write_page([one] * 9)


def test_only_a_page_is_written_over(write_run: Write, tmp_path: Path) -> None:
    folder, notes = write_run(), tmp_path / "notes.html"
    page = write_page([folder])
    assert write_page([folder]) == page
    notes.write_text("mine")
    with pytest.raises(AlignkitError, match=r"notes\.html: found another file than a page .* --out$"):
        write_page([folder], notes)
    assert notes.read_text() == "mine"


def test_the_page_shows_what_was_run_and_what_came_of_it(write_run: Write) -> None:
    text = plain(page_of(write_run(warnings=["careful"])))
    for part in (
        "draft on shapes_lcm for shine", "no recipe, no addition to the paper", "40 of 40 updates", "640 samples",
        "Example 9000", "c0ffee", "0.500 → 0.900", "+0.400 [+0.350, +0.450]", "held-out", "No sign of reward hacking",
        "all is well", "Exports update 40: best", "careful", "a red circle", "before training",
    ):  # fmt: skip
        assert part in text, part
    assert "Not on this page" not in text


def test_several_runs_stand_side_by_side(write_run: Write) -> None:
    text = plain(page_of(write_run("left"), write_run("right", rise=-0.01)))
    assert text.count("left") > 10 and text.count("right") > 10
    assert "0.100" in text and "0.900" in text


def test_runs_whose_folders_have_the_same_name_are_named_by_their_paths(write_run: Write, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    one, two = write_run("run"), write_run("a/run")
    text = plain(page_of(one, two))
    assert str(one) in text and str(two) in text


def test_the_ends_of_an_interval_have_one_form() -> None:
    assert spread(-0.003, 2.5e-4, signed=True) == "[\N{MINUS SIGN}0.003, +0.000]"
    assert spread(1e-5, 2e-4) == "[1.00e\N{MINUS SIGN}05, 2.00e\N{MINUS SIGN}04]"
    assert spread(None, 1.0) == ""


def test_the_page_needs_nothing_from_elsewhere(write_run: Write) -> None:
    page = page_of(write_run())
    elements = Elements(page)
    for tag, attributes in elements.found:
        assert tag not in {"link", "iframe", "object", "embed", "base", "form"}
        assert (attributes.get("src") or "data:").startswith("data:")
        assert (attributes.get("href") or attributes.get("xlink:href") or "#").startswith("#")
    assert "http://" not in page and "https://" not in page and "@import" not in page
    assert Counter(tag for tag, _ in elements.found)["script"] == 1
    policy = next(a["content"] for tag, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")


def test_no_two_elements_share_a_name(write_run: Write) -> None:
    names = Counter(a["id"] for _, a in Elements(page_of(write_run("one"), write_run("two"))).found if "id" in a)
    assert names.most_common(1)[0][1] == 1


def test_text_from_outside_is_no_markup(write_run: Write) -> None:
    evil = EVIL[0] + EVIL[1]
    settings = SETTINGS + f"\n[[regulariser]]\nname = '''{EVIL[2]}'''\n"
    settings = settings.replace('name = "shapes_lcm"', f"name = '''{evil}'''").replace('"shine"', f"'''{EVIL[2]}'''")
    folder = write_run(prompts=EVIL, warnings=EVIL, settings=settings)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    row = rows(40)[0] | {"reward": EVIL[1], "held_out": True}
    lines += [
        json.dumps({"step": 40, "exported": 40, "weights": "best", "text": evil}),
        json.dumps({"step": 40, "verdict": EVIL[0], "text": EVIL[1]}),
        json.dumps({"step": 40, "point": [*rows(40), row], "seconds": 1.0}),
        json.dumps(update_line(41) | {EVIL[0]: 1.0, EVIL[1]: 2.0}),
    ]
    write_lines(folder, lines)
    for scores in folder.glob("points/*/scores.json"):
        entries = json.loads(scores.read_text(encoding="utf-8"))
        entries = [entry | {"scores": {**entry["scores"], EVIL[1]: 0.5}} for entry in entries]
        scores.write_text(json.dumps(entries), encoding="utf-8")
    harmless = Elements(page_of(write_run("harmless", prompts=["a"] * len(EVIL))))
    page = write_page([folder]).read_text(encoding="utf-8")
    found = Elements(page)
    assert {tag for tag, _ in found.found} == {tag for tag, _ in harmless.found} | {"li", "ul"}
    assert {n for _, a in found.found for n in a} == {n for _, a in harmless.found for n in a}
    assert Counter(tag for tag, _ in found.found)["style"] == Counter(tag for tag, _ in found.found)["script"] == 1
    text = " ".join(text for tag, text in found.text if tag == "bdi")
    assert all(part in text for part in (EVIL[0], EVIL[1], EVIL[3], EVIL[4], EVIL[5]))
    assert "x" * 5000 in text and "half of a pair ?" in text and " 49 " not in text


def test_a_text_of_any_length_is_cut_and_says_so(write_run: Write) -> None:
    text = plain(page_of(write_run(prompts=["y" * 100_000])))
    assert "y" * 6000 + " ... (94,000 more characters)" in text and "y" * 6001 not in text


@pytest.mark.parametrize(
    ("prompts", "updates", "reason"),
    [
        ((), 40, "there is no point (evaluate.points)"),
        ((), 1, "there is no point (evaluate.points)"),
        ((), 0, "No curves: there is no update yet"),
        (("a red circle",), 1, ""),
    ],
)
@pytest.mark.parametrize("ended", [True, False])
def test_what_has_no_data_is_left_out_with_a_line(
    write_run: Write, prompts: tuple[str, ...], updates: int, reason: str, ended: bool
) -> None:
    text = plain(page_of(write_run(prompts=prompts, updates=updates, ended=ended)))
    assert reason in text
    assert ("No gallery" in text or "gallery or strip" in text) == (not prompts)
    assert ("The run has not ended" in text) == (not ended and updates < 40)


def test_a_folder_with_warnings_alone_makes_a_page(write_run: Write) -> None:
    folder = write_run(prompts=(), updates=0, ended=False)
    write_lines(folder, [{"step": 0, "warning": f"number {i}"} for i in range(70)])
    text = plain(page_of(folder))
    assert "70 warnings" in text and "number 49" in text and "number 50" not in text
    assert "20 more are in metrics.jsonl" in text
    assert "No table of rewards" in text and "it takes a held-out reward" in text


def test_metrics_that_are_never_finite_are_named(write_run: Write) -> None:
    folder = write_run(prompts=(), updates=0, ended=False)
    write_lines(folder, [update_line(step, lost=None, partly=None if step < 3 else 1.0) for step in range(1, 5)])
    text = plain(page_of(folder))
    assert "No chart of lost: no finite value" in text and "not finite in 2 updates" in text


def test_numbers_at_the_edge_of_what_a_float_holds_make_a_page(write_run: Write) -> None:
    folder = write_run(updates=2)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for row in line.get("point", ()):
            row.update(before=None)
    lines += [update_line(step, huge=(-1) ** step * 1.7e308, tiny=5e-324, steady=3.0) for step in range(3, 400)]
    write_lines(folder, lines)
    page = page_of(folder)
    assert "huge" in page and "nan" not in "".join(re.findall(r' d="[^"]*"', page))


def test_reward_hacking_is_named_with_its_points(write_run: Write) -> None:
    folder = write_run(ended=False)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for row in line.get("point", ()):
            if row["held_out"] and line["step"] == 20:
                row.update(difference=-0.3, low=-0.4, high=-0.2)
    write_lines(folder, lines)
    assert "The points at update 20 show reward hacking" in plain(page_of(folder))


def test_many_large_images_stay_below_the_limit_and_the_page_says_what_is_missing(write_run: Write) -> None:
    import numpy as np
    from PIL import Image

    folder = write_run(prompts=[f"prompt {number}" for number in range(60)])
    noise = np.random.default_rng(0)
    for path in sorted(folder.glob("points/*/*.png")):
        Image.fromarray(noise.integers(0, 255, (128, 128, 3), dtype=np.uint8)).save(path)  # 49 kB each
    page = page_of(folder)
    assert 3_000_000 < len(page.encode()) < LARGEST
    assert re.search(r"The gallery shows \d+ of 60 prompts", plain(page))


def test_a_hundred_thousand_updates_make_a_page_of_few_points(write_run: Write) -> None:
    folder = write_run(updates=0, prompts=(), ended=False)
    values = [json.dumps(update_line(1, extra=0.5)).replace('"step": 1,', '"step": %d,')] * 100_000
    (folder / "metrics.jsonl").write_text("".join(f"{line % (i + 1)}\n" for i, line in enumerate(values)))
    page = page_of(folder)
    assert len(page) < 500_000 and "100,000 of 40 updates" in plain(page)


def test_a_page_that_cannot_be_written_is_one_warning(
    write_run: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    keep_page(tmp_path, warnings.append)
    assert len(warnings) == 1 and "no metrics.jsonl" in warnings[0] and f"alignkit report {tmp_path}" in warnings[0]
    folder = write_run()
    (folder / "report.html").mkdir()
    keep_page(folder, warnings.append)
    assert len(warnings) == 2 and "could not be written" in warnings[1]
    monkeypatch.setattr("alignkit.page.page.render", lambda records: 1 / 0)
    keep_page(folder, warnings.append)
    assert len(warnings) == 3 and "ZeroDivisionError: division by zero" in warnings[2]


def test_the_libraries_of_the_page_are_imported_when_one_is_written() -> None:
    heavy = "{'matplotlib', 'jinja2', 'torch', 'PIL', 'IPython'}"
    code = f"import sys, alignkit.cli.app, alignkit.page.facts; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    code = code.replace("alignkit.page.facts", "alignkit.runs.run")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "matplotlib" not in done.stdout and "IPython" not in done.stdout
