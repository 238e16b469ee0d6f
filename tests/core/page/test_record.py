from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from alignkit.errors import AlignkitError
from alignkit.page.record import MINUTES, SAMPLES, UPDATES, read_record
from page_fixtures import Write, rows, update_line, write_lines


def test_the_record_of_a_run_holds_all_that_its_folder_does(write_run: Write) -> None:
    record = read_record(write_run(warnings=["careful"]))
    assert record.name == "first" and record.faults == [] and record.warnings == ["careful"]
    assert record.last == record.total == record.end == 40
    assert record.held_out == ["pixels"]
    assert list(record.points) == [0, 20, 40] and len(record.points[40].images) == 6
    assert record.points[20].images[0, 2].scores["reward"] == pytest.approx(0.7)
    assert record.metrics["reward"] == pytest.approx(0.5 + np.arange(1, 41) / 100)
    assert record.verdict == ("no sign", "no sign of reward hacking: all is well")
    assert {row.count for row in record.compared} == {100}
    assert record.environment["git"] == "c0ffee"


def test_progress_is_measured_in_updates_samples_and_minutes_of_updates_and_points(write_run: Write) -> None:
    record = read_record(write_run())
    assert record.axes[UPDATES].tolist() == list(range(1, 41))
    assert record.axes[SAMPLES][-1] == 40 * 16
    assert record.points[0].place == {UPDATES: 0, SAMPLES: 0, MINUTES: pytest.approx(0.1)}
    assert record.points[20].place == {UPDATES: 20, SAMPLES: 320, MINUTES: pytest.approx((40 + 12) / 60)}
    assert record.axes[MINUTES][20] == pytest.approx((42 + 12) / 60)


def test_rounds_of_the_warm_up_lie_before_the_first_update(write_run: Write) -> None:
    folder = write_run(prompts=(), updates=0, ended=False)
    write_lines(folder, [*[update_line(0, pair_accuracy=0.5)] * 3, update_line(1), update_line(2)])
    record = read_record(folder)
    assert record.axes[UPDATES].tolist() == [-2, -1, 0, 1, 2]
    assert np.isnan(record.metrics["pair_accuracy"]).tolist() == [False] * 3 + [True] * 2


def test_values_that_are_not_finite_are_missing(write_run: Write) -> None:
    folder = write_run(prompts=(), updates=0, ended=False)
    empty = rows(2)[0] | {"before": None, "after": None}
    late = update_line(2, drift=1.0)
    write_lines(folder, [update_line(1, loss=None), late, {"step": 2, "point": [empty], "seconds": None}])
    record = read_record(folder)
    assert record.metrics["loss"] == pytest.approx([math.nan, -0.2], nan_ok=True)
    assert record.metrics["drift"] == pytest.approx([math.nan, 1.0], nan_ok=True)
    assert math.isnan(record.points[2].rows[0].before)


def test_lines_that_cannot_be_read_are_counted_and_unknown_ones_left_out(write_run: Write) -> None:
    folder = write_run(prompts=(), updates=0, ended=False)
    unknown = [{"step": 1, "point": "none"}, {"step": 1, "evaluation": [{"reward": 1}, 2]}, {"step": 1, "note": "x"}]
    write_lines(folder, [update_line(1), "{", "[]", '{"step": 1e999}', *unknown, '{"step": 2, "lo'])
    record = read_record(folder)
    assert record.faults == ["metrics.jsonl: 4 lines could not be read"]
    assert record.points == {} and record.evaluations == {} and record.axes[UPDATES].tolist() == [1]


def test_missing_files_are_named_and_end_nothing(write_run: Write) -> None:
    folder = write_run()
    for name in ("run.toml", "environment.json", "points/000020/scores.json"):
        (folder / name).unlink()
    record = read_record(folder)
    assert [fault.partition(":")[0] for fault in record.faults] == [
        "run.toml", "environment.json", "points/000020/scores.json",
    ]  # fmt: skip
    assert record.total == 40 and record.points[20].images == {}


def test_a_folder_without_a_record_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(AlignkitError, match=r"no metrics\.jsonl here; expected the folder of a run"):
        read_record(tmp_path)


def test_files_of_a_point_lie_in_its_folder(write_run: Write) -> None:
    folder = write_run()
    scores = folder / "points" / "000020" / "scores.json"
    entries = json.loads(scores.read_text())
    entries[0]["file"] = "../../points/000040/000_1steps.png"
    entries[1]["file"] = str(folder / "points" / "000040" / "000_2steps.png")
    entries[2]["scores"] = "none"
    scores.write_text(json.dumps([*entries, 3, {"file": None}]))
    images = read_record(folder).points[20].images
    assert sorted(images) == [(1, 1), (1, 2), (2, 1), (2, 2)] and images[1, 1].scores == {}


def test_points_that_a_resumed_run_has_not_reached_yet_are_left_out(write_run: Write) -> None:
    folder = write_run()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    write_lines(folder, lines[:25])
    record = read_record(folder)
    assert list(record.points) == [0, 20] and record.end == 20 and record.exported is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ('recipe = ""', ""),
        ('recipe = "shiny"', "recipe shiny, not the paper's"),
        ('recipe = ""\n[[regulariser]]\nname = "unheard_of"', ""),
    ],
)
def test_the_record_states_what_is_not_the_papers(write_run: Write, change: str, expected: str) -> None:
    from page_fixtures import SETTINGS

    settings = SETTINGS.replace('recipe = ""', change.partition("\n")[0]) + change.partition("\n")[2]
    record = read_record(write_run(settings=settings))
    assert record.departure == expected
    assert bool(record.faults) == ("unheard_of" in change)


def test_an_addition_of_the_method_is_a_departure_from_the_paper(write_run: Write) -> None:
    from page_fixtures import SETTINGS

    settings = SETTINGS.replace('name = "draft"', 'name = "draft"\nevery_step = true')
    assert read_record(write_run(settings=settings)).departure == "algorithm.every_step, not the paper's"
