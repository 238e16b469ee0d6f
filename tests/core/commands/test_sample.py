"""Images of a model or run in a folder: what it holds, what reads it, and what is refused before a model loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import alignkit
from alignkit.cli.app import app
from alignkit.commands.sample import sample
from alignkit.data.images import ImageSet, open_images
from alignkit.data.preferences import open_pairs
from alignkit.models.diffusers_policy import DiffusersPolicy
from alignkit.runs.run import Run, open_run

MakeRun = Callable[..., Run]
ODD = "a red circle\nsecond\u2028line \U0001f600 \u0645\u0631\u062d\u0628\u0627 <script>\"'\\ " + "and so on, " * 455
"""A prompt of over 5000 characters, with line breaks, emoji, right-to-left text and markup."""


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def table(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").split("\n") if line]


@pytest.fixture
def samples(tiny_lcm: Path, brightness: None, tmp_path: Path) -> Path:
    """Eight images: of two prompts, at one and two steps, two each."""
    out = tmp_path / "images"
    arguments = ("one", ODD, "--steps", "1,2,1", "--count", "2", "--seed", "5", "--out", str(out))
    assert command("sample", str(tiny_lcm), *arguments).exit_code == 0
    return out


def test_every_image_has_a_line_and_text_chunks_and_a_grid_shows_all(samples: Path, tiny_lcm: Path) -> None:
    lines = table(samples)
    assert {path.name for path in samples.iterdir()} == {
        "metadata.jsonl", "grid.png", *(f"00{p}_{k}steps_{c}.png" for p in (0, 1) for k in (1, 2) for c in (0, 1))
    }  # fmt: skip
    assert len(lines) == 8 and lines[6] == {
        "file_name": "001_2steps_0.png", "text": ODD, "seed": 5, "noise": 2, "steps": 2, "model": str(tiny_lcm),
        "run": "",
    }  # fmt: skip
    expected = open_run(str(tiny_lcm)).sample(["one", ODD], steps=2, seed=5, count=2)
    for line, image in zip(lines[4:], expected, strict=True):
        with Image.open(samples / line["file_name"]) as found:
            assert found.tobytes() == image.tobytes()
            assert found.text["prompt"] == line["text"]  # type: ignore[attr-defined]
            assert found.text["noise"] == str(line["noise"])  # type: ignore[attr-defined]
    with Image.open(samples / "grid.png") as grid:
        assert grid.size == (4 + 4 * 132, 18 + 2 * 150)


def test_the_folder_is_read_by_score_pairs_and_data_images(samples: Path, tmp_path: Path) -> None:
    scores = json.loads(command("score", "brightness", str(samples), "--json").stdout)
    assert [record["prompt"] for record in scores] == [line["text"] for line in table(samples)]
    with Image.open(samples / "000_1steps_0.png") as image:
        assert scores[0]["score"] == pytest.approx(np.asarray(image).mean() / 255, abs=1e-6)
    shown = command("score", "brightness", str(samples)).stdout.splitlines()
    assert len(shown) == 1 + 8 and "second line \U0001f600" in shown[3]
    (tmp_path / "p.txt").write_text("another")
    other = command("score", "brightness", str(samples), "--prompts", str(tmp_path / "p.txt"), "--json")
    assert {record["prompt"] for record in json.loads(other.stdout)} == {"another"} and "grid.png" not in other.stdout

    out = tmp_path / "pairs"
    made = command("pairs", str(samples), "--reward", "brightness", "--out", str(out))
    assert (made.exit_code, made.stdout) == (0, f"{out}: 2 pairs of 2 prompts\n"), made.output
    by_text = {text: [r["score"] for r in scores if r["prompt"] == text] for text in ("one", ODD)}
    for line in (json.loads(line) for line in (out / "pairs.jsonl").read_text("utf-8").split("\n") if line):
        assert line["winner_score"] == pytest.approx(max(by_text[line["text"]]))
        assert line["loser_score"] == pytest.approx(min(by_text[line["text"]]))
    assert {*open_pairs(str(out), 8).batch(0, 2, 0).captions} == {"one", ODD}

    images = open_images(str(samples), 8)
    assert isinstance(images, ImageSet) and {images.load(i)[1].text for i in range(len(images))} == {"one", ODD}


def test_a_run_trains_on_the_images_of_another_and_its_own_name_it(tiny_run: MakeRun, tmp_path: Path) -> None:
    settings = {"algorithm.name": "lcd", "reward": [], "train.updates": 1, "evaluate.prompts": ""}
    first = tiny_run("first", settings)
    list(first.train())
    list(sample(alignkit.load(resume=first.folder), ["a red circle", ODD], tmp_path / "images"))
    assert {line["run"] for line in table(tmp_path / "images")} == {str(first.folder)}
    assert table(tmp_path / "images")[0]["file_name"] == "000_0.png"
    assert len(list(tiny_run("second", settings | {"data.images": str(tmp_path / "images")}).train())) == 1


def test_without_out_the_first_free_folder_is_taken(
    tiny_lcm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("samples", "samples-2", "samples-3"):
        found = command("sample", str(tiny_lcm), "a red circle", "--steps", "1")
        assert found.stdout.splitlines() == [f"{folder}/000_1steps_0.png", f"{folder}/grid.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "one", "--out", "FULL"], "FULL: exists already; choose another folder"),
        (["MODEL", "one", "--out", "FULL/mine.txt/x"], "FULL/mine.txt/x: cannot be written (Not a directory)"),
        (["MODEL", "one", " "], "PROMPT 2: found ' ', expected text"),
        (["MODEL", "one", "a\udcff"], "PROMPT 2: found '\\udcff' at character 2, expected UTF-8 text"),
        (["MODEL", "one", "--steps", "1,99"], "steps: num_steps: found 99"),
        (["RUN", "one"], "RUN: no checkpoint to sample from"),
    ],
)
def test_a_fault_is_found_before_the_model_loads_and_leaves_nothing(
    arguments: list[str], message: str, tiny_run: MakeRun, tiny_lcm: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def load(*_: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(DiffusersPolicy, "load", load)
    monkeypatch.chdir(tmp_path)
    for folder, name in (("FULL", "mine.txt"), ("RUN", "run.toml")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("")
    before = sorted(tmp_path.rglob("*"))
    result = command("sample", *(str(tiny_lcm) if word == "MODEL" else word for word in arguments))
    assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_call_that_breaks_off_leaves_a_folder_that_can_be_read(tiny_run: MakeRun, tmp_path: Path) -> None:
    found = sample(tiny_run(), ["one", "two"], tmp_path / "images")
    assert next(found).name == "000_0.png"
    del found
    assert [line["file_name"] for line in table(tmp_path / "images")] == ["000_0.png"]
    assert len(json.loads(command("score", "brightness", str(tmp_path / "images"), "--json").stdout)) == 1


def test_images_in_a_folder_take_no_flags_of_sampling(samples: Path, tmp_path: Path) -> None:
    result = command("pairs", str(samples), "--out", str(tmp_path / "pairs"), "--count", "3")
    assert result.exit_code == 1 and result.stderr.startswith(f"error: --count: {samples} holds images")
    (samples / "000_1steps_0.png").unlink()
    result = command("score", "brightness", str(samples))
    assert result.exit_code == 1 and "metadata.jsonl, line 1: there is no file" in result.stderr
