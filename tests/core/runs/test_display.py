from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from alignkit.cli.output import lasting_console
from alignkit.evaluation.rows import Row
from alignkit.runs.display import SPARKLINE, Display, sparkline
from alignkit.runs.report import Report

ROW = Row("reward", 2, 64, 0.5, 0.75, 0.25, 0.1, 0.4)
HELD_OUT = Row("pixel_check", 2, 64, 0.5, 0.25, -0.25, -0.4, -0.1, held_out=True)
METRICS = {"reward": 0.75, "of_my_own": 3.0, "pair_accuracy": 0.875, "rank_correlation": 0.5, "loss": -1.5} | {
    "grad_norm": 1.25, "images_per_second": 41.5, "memory_gib": 0.75, "seconds": 3.5,
}  # fmt: skip


def log() -> Console:
    return Console(file=io.StringIO(), width=80)


def terminal(height: int = 24) -> Console:
    return Console(file=io.StringIO(), width=80, height=height, force_terminal=True)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def view_of(display: Display) -> list[str]:
    """Return the lines of the view as they are on the screen."""
    assert display.console is not None
    with display.console.capture() as capture:
        display.console.print(display.view())
    return [line.rstrip() for line in Text.from_ansi(capture.get()).plain.splitlines()]


def trained(display: Display, updates: int = 30) -> Display:
    for step in range(1, updates + 1):
        display.update(step, {**METRICS, "reward": 0.5 + step / 100}, 3.5)
    display.point(30, [ROW, HELD_OUT])
    return display


def test_a_log_has_one_short_line_a_round_whatever_its_updates_and_metrics() -> None:
    console = log()
    many = {f"metric_{number}": 1 / 3 for number in range(40)}
    with Display(console, total=1_000_000) as display:
        for step in range(100_000, 100_004):
            display.update(step, {**METRICS, **many, "loss": -1.23456e-17}, 3.5)
        display.end_round()
    (line,) = shown(console).splitlines()
    assert len(line) <= 100 and line.startswith("100003/1000000  reward 0.75  pairs right 0.875  grad 1.25  images/s")
    assert line.endswith(" left") and line.count("reward") == 1


def test_with_verbose_a_line_has_every_metric() -> None:
    console = log()
    with Display(console, total=9, verbose=True) as display:
        display.update(1, METRICS, 3.5)
        display.end_round()
    assert len(shown(console).splitlines()) == 1
    for part in ("reward 0.75", "pairs right 0.875", "of_my_own 3"):
        assert part in shown(console)


def test_rounds_of_the_warm_up_are_counted_apart() -> None:
    console = log()
    with Display(console, total=10, warmup=3) as display:
        for _ in range(2):
            display.update(0, {"surrogate_loss": 0.7}, 1.0)
            display.end_round()
        display.update(1, METRICS, 1.0)
        display.end_round()
    assert [line.partition("  ")[0] for line in shown(console).splitlines()] == ["warm-up 1/3", "warm-up 2/3", "1/10"]


def test_the_view_has_what_matters_first_and_fits_a_small_terminal() -> None:
    lines = view_of(trained(Display(terminal(), total=120)))
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    starts = ("30/120 ", "reward ", "held-out prompts ", "  reward ", "  pixel_check ", "surrogate ", "loss ", "speed,")
    assert [line[: len(start)] for line, start in zip(lines[1:], starts, strict=True)] == list(starts)
    text = "\n".join(lines)
    # The mean of the last 20 updates, and the reward of the round before the first update.
    assert "0.705  mean of 20, 0.510 before training" in text and "▁" in text and "█" in text
    assert "at 2 steps, after 30 updates" in text and "0.750 (+0.250)" in text and "0.250 (-0.250)" in text
    assert "0.88 pairs right, 0.50 rank correlation" in text and "41.5 images/s, 0.75 GiB" in text
    assert "of_my_own" not in text


@pytest.mark.parametrize("height", [24, 60])
def test_with_verbose_the_view_has_as_many_further_metrics_as_fit(height: int) -> None:
    display = trained(Display(terminal(height), total=120, verbose=True))
    display.update(31, {f"metric_{number}": 1 / 3 for number in range(30)}, 3.5)
    lines = view_of(display)
    assert len(lines) < height and ("metric_29" in "\n".join(lines)) == (height == 60)
    assert "of_my_own" in "\n".join(lines)


def test_the_view_goes_when_the_run_ends_and_details_stay_away() -> None:
    console = terminal()
    with Display(console, total=120) as display:
        display.stage("measuring")
        trained(display)
        display.message("a detail", detail=True)
        display.message("a message")
    text = shown(console)
    assert "a message" in text and "a detail" not in text
    assert "\x1b[?25h" in text and text.endswith("\x1b[1A\x1b[2K")  # the cursor is back, the lines are cleared


def test_time_left_is_that_of_updates_alone_once_they_began(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = log()
    display = Display(console, total=10, warmup=2)
    for step, seconds in ((0, 1.0), (0, 1.0), (1, 10.0), (2, 10.0)):
        now[0] += seconds
        display.update(step, {"reward": 0.5}, seconds)
        display.end_round()
    left = [line.rpartition("  ")[2] for line in shown(console).splitlines()]
    assert left == ["0:00:11 left", "0:00:10 left", "0:01:30 left", "0:01:20 left"]


def test_a_resumed_run_still_knows_its_reward_before_training(tmp_path: Path) -> None:
    with Report(tmp_path, Display(None, total=9)) as report:
        report.update(0, {"reward": 0.25})
        report.update(1, {"reward": 0.35})
        report.update(2, {"reward": 0.9})
        report.point(2, [ROW])
        saved = report.lines
    display = Display(terminal(), total=9, warmup=1)
    with Report(tmp_path, display, lines=saved) as report:
        report.update(3, {"reward": 0.9})
    assert "0.600  mean of 4, 0.300 before training" in "\n".join(view_of(display))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(record["memory_gib"] > 0.01 for record in records if "reward" in record)


def test_a_sparkline_has_a_block_for_each_part_of_the_values() -> None:
    assert sparkline([1.0]) == "" and sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([0.0, 1.0, 2.0, 7.0]) == "▁▂▃█"
    long = sparkline([float(step) for step in range(100_000)])
    assert len(long) == SPARKLINE and list(long) == sorted(long)


def test_text_that_looks_like_markup_is_shown_as_it_is() -> None:
    console = log()
    with Display(console, total=1) as display:
        display.message("[red]a[/] [/nothing] :smile:")
        display.results({"report": Path("runs/[bold]")}, ["alignkit", "sample", "runs/a b", "a 'red' circle"])
    assert shown(console).splitlines() == [
        "[red]a[/] [/nothing] :smile:",
        "report   runs/[bold]",
        """next     alignkit sample 'runs/a b' 'a '"'"'red'"'"' circle'""",
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_silences_a_console_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        console = lasting_console()
        for _ in range(2):
            console.print("text " * 10_000)
        console.file.flush()


@pytest.mark.slow  # a training in a process of its own
def test_a_run_outlives_its_pipe_and_saves_when_its_terminal_goes(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "alignkit", "train", "--algo", "ddpo", "--reward", "attribute_binding", "--plain",
        "--set", "train.updates=10000", "--set", "evaluate.points=0", "--set", "evaluate.prompts=",
        "--set", "data.batch_size=2", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    record = tmp_path / "run" / "metrics.jsonl"
    pipe = subprocess.PIPE
    # The tests may themselves run under nohup, which ignores the signal for all that it starts.
    heard = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=heard) as training:
        assert training.stdout is not None
        assert training.stdout.readline() == "loading torch, diffusers and transformers\n"
        assert not record.parent.exists()  # it is shown before all else
        training.stdout.close()
        while not record.exists() or '"step": 2' not in record.read_text():
            assert training.poll() is None
            time.sleep(0.1)
        training.send_signal(signal.SIGHUP)
        training.stdout = None
        try:
            _, told = training.communicate(timeout=120)
        finally:
            training.kill()
    assert training.returncode == 128 + signal.SIGHUP and "stopped; resume with: alignkit train --resume" in told
    assert any((tmp_path / "run" / "checkpoints").iterdir())
