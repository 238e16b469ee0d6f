"""`make demo`: two trainings in one terminal, their results, one gallery; failures and signals leave nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
DEMO = [sys.executable, str(ROOT / "examples" / "demo.py")]

STAND_IN = """
import signal, sys, time
from pathlib import Path

arguments = sys.argv[1:]
out = Path(arguments[arguments.index("--out") + 1])
if arguments[0] == "gallery":
    assert all((Path(run) / "result").exists() for run in arguments[1:3])
    out.write_text("gallery")
    sys.exit()
def stop(number, frame):
    print(f"stopped by {signal.Signals(number).name}", file=sys.stderr)
    sys.exit(128 + number)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
out.mkdir(parents=True)
print("  before training\\n  steps  reward\\n\\nmeans over 6 prompts\\npoint 0/2  reward 0.5")
print("1/2  reward 0.5  loss 1  0:00:01 left")
if "--fail" in arguments:
    sys.exit("error: reward.judge: missing")
(out / "ready").touch()
if "--wait" in arguments:
    time.sleep(60)
print("exports the average weights of update 2 of 2\\n  after 2 of 2 updates\\n  table of", out.name)
(out / "result").touch()
"""
"""A program in the place of `alignkit` that prints what a training prints."""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Variables under which `python -m alignkit` is the stand-in."""
    package = tmp_path / "stand_in" / "alignkit"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    return {**os.environ, "PYTHONPATH": str(package.parent)}


def test_points_are_shown_at_once_and_results_when_both_have_ended(tmp_path: Path, environment: dict[str, str]) -> None:
    done = subprocess.run([*DEMO, "out"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    live, _, results = done.stdout.partition("─ lasro ─")
    assert sorted(live.rstrip("─").splitlines()) == [
        "draft  alignkit train --algo draft --reward attribute_binding --out out/draft",
        "draft  point 0/2  reward 0.5",
        "lasro  alignkit train --algo lasro --reward attribute_binding --out out/lasro",
        "lasro  point 0/2  reward 0.5",
    ]
    shown = re.findall(r"table of \w+|─ draft ─|alignkit gallery .*", results)
    galleries = [f"alignkit gallery out/lasro out/draft {flags}" for flags in (
        "--out out/gallery.png", "--pick rise --out out/gains.png",
    )]  # fmt: skip
    assert shown == ["table of lasro", "─ draft ─", "table of draft", *galleries]
    for name in ("gallery.png", "gains.png"):
        assert (tmp_path / "out" / name).read_text() == "gallery"
    assert "1/2  reward 0.5  loss 1  0:00:01 left" in (tmp_path / "out" / "draft.log").read_text()


def test_the_other_training_ends_if_one_fails_and_its_result_stays(tmp_path: Path, environment: dict[str, str]) -> None:
    arguments = [*DEMO, "out", "--draft=--fail"]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: draft failed; all that it printed is in out/draft.log",
        "the result of lasro is in out/lasro",
    ]
    assert "draft  error: reward.judge: missing\n" in done.stdout and "table of lasro" in done.stdout
    assert (tmp_path / "out" / "lasro" / "result").exists() and not (tmp_path / "out" / "gallery.png").exists()


@pytest.mark.parametrize(
    ("number", "received"),
    [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGTERM")],
    ids=lambda value: str(value),
)
def test_a_signal_stops_both_once_and_leaves_no_process(
    tmp_path: Path, environment: dict[str, str], number: signal.Signals, received: str
) -> None:
    arguments = [*DEMO, "out", "--lasro=--wait", "--draft=--wait"]
    pipe = subprocess.PIPE
    # As in a terminal, all processes of the group get the signal.
    demo = subprocess.Popen(
        arguments, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True, process_group=0
    )
    while not all((tmp_path / "out" / method / "ready").exists() for method in ("lasro", "draft")):
        assert demo.poll() is None
        time.sleep(0.05)
    os.killpg(demo.pid, number)
    # The trainings hold the pipe open, so this returns when they have ended as well.
    stdout, stderr = demo.communicate(timeout=30)
    assert (demo.returncode, stderr) == (128 + number, "stopped\n")
    assert [stdout.count(f"{method}  stopped by {received}\n") for method in ("lasro", "draft")] == [1, 1]


def test_a_folder_with_files_is_rejected_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").touch()
    done = subprocess.run([*DEMO, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, [path.name for path in tmp_path.iterdir()]) == (1, "", ["kept.txt"])
    assert done.stderr == f"error: {tmp_path} exists and is not empty; name another folder: make demo OUT=FOLDER\n"


def test_the_makefile_passes_folder_and_flags(tmp_path: Path) -> None:
    flags = ["OUT=my/demo", "LASRO=--seed 1 --set evaluate.steps=[1]", "DRAFT=--seed 2"]
    # `make test` hands its flags to a make below it, which then also prints the folders that it enters and leaves.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    command = ["make", "-n", "demo", *flags]
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    expected = "examples/demo.py my/demo --lasro='--seed 1 --set evaluate.steps=[1]' --draft='--seed 2'"
    assert made.stdout.splitlines()[-1].endswith(expected)


@pytest.mark.long
def test_the_demo_trains_both_methods_and_shows_them_side_by_side(tmp_path: Path) -> None:
    small = [
        "train.updates=2", "data.batch_size=4", "evaluate.limit=6", "evaluate.samples=1", "evaluate.points=1",
        "evaluate.points_limit=6", "evaluate.steps=[1]",
    ]  # fmt: skip
    flags = " ".join(f"--set {assignment}" for assignment in small)
    arguments = [*DEMO, str(tmp_path / "out"), f"--lasro={flags}", f"--draft={flags}"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("after 2 of 2 updates") == 2
    for name in ("gallery.png", "gains.png"):
        with Image.open(tmp_path / "out" / name) as image:
            assert image.width > 3 * 256 and image.height > 6 * 256
