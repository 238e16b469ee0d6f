"""Preference pairs from a model and a reward: the winner, the files that are written, and reading them as pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from alignkit.cli.app import app
from alignkit.commands.pairs import Made, make_pairs, preferred
from alignkit.data.preferences import open_pairs
from alignkit.errors import AlignkitError, ConfigError
from alignkit.runs.run import Run

MakeRun = Callable[..., Run]


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def brightness(file: Path) -> float:
    with Image.open(file) as opened:
        pixels = torch.frombuffer(bytearray(opened.convert("RGB").tobytes()), dtype=torch.uint8)
    return float(pixels.float().mean() / 255)


@pytest.mark.parametrize(
    ("scores", "every", "margin", "expected"),
    [
        ([0.1, 0.9, 0.5], False, 0.0, [(1, 0)]),
        ([0.1, 0.9, 0.5], True, 0.0, [(1, 2), (1, 0), (2, 0)]),
        ([0.1, 0.9, 0.5], True, 0.4, [(1, 0)]),
        ([0.5, 0.5, 0.5], True, 0.0, []),
        ([0.5, 0.2, 0.5, 0.2], False, 0.0, [(0, 1)]),
        ([0.5, 0.2, 0.5], True, 0.0, [(0, 1), (2, 1)]),
        ([math.nan, 0.3, math.nan], False, 0.0, []),
        ([math.nan, 0.3, 0.4], False, 0.0, [(2, 1)]),
        ([math.nan, math.nan], False, 0.0, []),
    ],
)
def test_the_better_image_wins_and_no_preference_is_no_pair(
    scores: list[float], every: bool, margin: float, expected: list[tuple[int, int]]
) -> None:
    assert list(preferred(scores, every, margin)) == expected


def test_pairs_carry_files_scores_and_seed_and_are_read_as_pairs(tiny_run: MakeRun, tmp_path: Path) -> None:
    out = tmp_path / "new" / "pairs"
    made = make_pairs(tiny_run(), out, count=3, seed=5, every=True)
    lines = read(out)
    assert made == Made(str(out), 5, len(lines), 0) and 5 <= len(lines) <= 15
    for line in lines:
        assert line["winner_score"] > line["loser_score"] and line["seed"] == 5 and line["steps"] == 2
        for member in ("winner", "loser"):
            assert brightness(out / line[member]) == pytest.approx(line[f"{member}_score"], abs=1e-5)
    pairs = open_pairs(str(out), 64)
    batch = pairs.batch(0, len(lines), 0)
    assert bool((batch.winners.mean((1, 2, 3)) > batch.losers.mean((1, 2, 3))).all())
    assert sorted(batch.captions) == sorted(line["text"] for line in lines)


def test_generated_images_depend_on_seed_and_prompt_alone(tiny_run: MakeRun, tmp_path: Path) -> None:
    whole, parts, other = tmp_path / "whole", tmp_path / "parts", tmp_path / "other"
    make_pairs(tiny_run(), whole, count=2)
    make_pairs(tiny_run(overrides={"evaluate.batch_size": 4}), parts, count=2)
    make_pairs(tiny_run(), other, count=2, seed=1, limit=2)
    assert len(read(whole)) == 5 and len(read(other)) == 2
    found = [[(x["winner"], x["loser"]) for x in read(folder)] for folder in (whole, parts)]
    assert found[0] == found[1]
    for one, again in zip(read(whole), read(parts), strict=True):
        assert one["winner_score"] == pytest.approx(again["winner_score"], abs=1e-4)
    assert read(other)[0]["winner_score"] != read(whole)[0]["winner_score"]


def test_prompts_without_a_preference_are_counted_and_none_at_all_is_an_error(
    tiny_run: MakeRun, odd_rewards: None, tmp_path: Path
) -> None:
    some = make_pairs(tiny_run(overrides={"reward": ["two_of_three"]}), tmp_path / "some", count=2)
    assert some.undecided > 0 and some.pairs == len(read(tmp_path / "some")) == 5 - some.undecided
    for reward in ("constant", "unscored"):
        with pytest.raises(AlignkitError, match="for none of the 5 prompts two images got different scores"):
            make_pairs(tiny_run(overrides={"reward": [reward]}), tmp_path / reward, count=2)


def test_nothing_is_overwritten(tiny_run: MakeRun, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    for folder in (out, out / "mine.txt"):
        with pytest.raises(ConfigError, match="exists already; choose another folder"):
            make_pairs(tiny_run(), folder)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(("fields", "message"), [({"count": 1}, "2 or more"), ({"margin": -1.0}, "0 or more")])
def test_counts_and_margins_that_allow_no_pair_are_refused(
    tiny_run: MakeRun, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_pairs(tiny_run(), tmp_path / "out", **fields)


def test_pairs_keep_the_metadata_of_their_prompt(tiny_run: MakeRun, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"text": "a red circle", "target": "OPEN"}')
    make_pairs(tiny_run(overrides={"data.prompts": str(prompts)}), tmp_path / "out", count=4)
    assert [line["metadata"] for line in read(tmp_path / "out")] == [{"target": "OPEN"}]


def test_the_command_generates_with_a_model_and_prints_the_counts(
    tiny_run: MakeRun, tiny_lcm: Path, tmp_path: Path
) -> None:
    tiny_run()  # its reward is installed
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    arguments = ["pairs", str(tiny_lcm), "--out", str(out), "--prompts", str(prompts), "--reward", "brightness"]
    arguments += ["--count", "2", "--limit", "3", "--steps", "1", "--set", "evaluate.batch_size=4"]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stdout) == (0, f"{out}: 3 pairs of 3 prompts\n"), result.output
    assert {line["steps"] for line in read(out)} == {1}
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1 and again.stderr.startswith("error: --out") and "exists already" in again.stderr
    json_out = CliRunner().invoke(app, [*arguments, "--json", "--out", str(tmp_path / "second")])
    assert json.loads(json_out.stdout)["pairs"] == 3
    without = CliRunner().invoke(app, ["pairs", str(tiny_lcm), "--out", str(tmp_path / "x"), "--reward", "brightness"])
    assert without.exit_code == 1 and without.stderr.startswith("error: data.prompts: missing")


def test_a_trained_run_generates_with_its_weights(tiny_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_run(overrides={"train.updates": 1, "evaluate.prompts": "", "train.learning_rate": 1e-2})
    list(run.train())
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["pairs", str(run.folder), "--out", str(out), "--count", "2"])
    assert result.exit_code == 0, result.output
    make_pairs(tiny_run("untrained"), tmp_path / "before", count=2)
    before, after = ([line["winner_score"] for line in read(folder)] for folder in (tmp_path / "before", out))
    assert before != after and read(out)[0]["model"] == run.name
