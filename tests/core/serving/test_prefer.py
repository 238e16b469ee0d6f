"""`alignkit prefer`: the images of a run, its command, and training on what was chosen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from alignkit.cli.app import app
from alignkit.data.preferences import open_pairs
from alignkit.errors import AlignkitError, ConfigError
from alignkit.runs.run import Run, load
from alignkit.serving.chooser import Chooser
from alignkit.serving.prefer import open_prefer, start, train_command

MakeRun = Callable[..., Run]


def answered(server: Chooser, *answers: str) -> None:
    """Answer the next pairs as the page would."""
    for answer in answers:
        state = server._wait({})
        server._answer({"session": server.session, "pair": state["pair"]["name"], "answer": answer})


@pytest.fixture
def choose(tmp_path: Path) -> Callable[..., Chooser]:
    """A function that answers pairs of a run in a folder and closes the server."""

    def chosen(run: Run, out: str, *answers: str, **settings: Any) -> Chooser:
        with open_prefer(run, tmp_path / out, port=0, **settings) as server:
            start(server, run)
            answered(server, *answers)
        return server

    return chosen


Choose = Callable[..., Chooser]


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "images").iterdir()}


def test_images_depend_on_seed_prompt_and_copy_alone(tiny_run: MakeRun, choose: Choose, tmp_path: Path) -> None:
    run = tiny_run()
    choose(run, "whole", *["left"] * 10, count=2)
    choose(run, "some", "left", "left", limit=2)
    choose(run, "some", "left", "left", limit=2, count=2)  # goes on with more
    choose(run, "other", "left", seed=1, limit=1)
    whole, some, other = (images(tmp_path / name) for name in ("whole", "some", "other"))
    assert len(whole) == len(set(whole.values())) == 20 and len(some) == 8
    assert all(whole[name] == data for name, data in some.items())
    assert not set(other.values()) & set(whole.values())
    lines = (tmp_path / "some" / "pairs.jsonl").read_text().splitlines()
    assert [(json.loads(line)["prompt"], json.loads(line)["copy"]) for line in lines] == [
        (0, 0),
        (1, 0),
        (0, 1),
        (1, 1),
    ]


def test_methods_on_pairs_train_on_the_folder_without_its_ties(
    tiny_run: MakeRun, choose: Choose, tmp_path: Path
) -> None:
    server = choose(tiny_run(), "choices", "left", "tie", "right", "skip", "left")
    assert server.summary() == "3 pairs, 1 tie, 1 skipped" and not server.pending
    pairs = open_pairs(str(tmp_path / "choices"), 64)
    assert "2 of 5 rows" in pairs.notes[0] and set(pairs.batch(0, 3, 0).captions) == {
        "a red circle", "a white ring", "an orange diamond",
    }  # fmt: skip
    for algorithm in ({"algorithm.name": "diffusion_dpo"}, {"algorithm.name": "pso", "algorithm.mode": "offline"}):
        settings = {"data.pairs": str(tmp_path / "choices"), "data.prompts": "", "evaluate.prompts": ""}
        run = tiny_run(algorithm["algorithm.name"], algorithm | settings | {"data.images": "", "train.updates": 1})
        assert [update.step for update in run.train()] == [1]


def test_a_run_is_compared_with_its_start_from_the_same_noise(
    tiny_run: MakeRun, choose: Choose, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--before: found a model, expected the folder of a run"):
        open_prefer(tiny_run(), tmp_path / "none", before=True)
    settings = {"train.updates": 1, "evaluate.prompts": "", "train.learning_rate": 0.1, "algorithm.name": "ddpo"}
    run = tiny_run(overrides=settings | {"data.images": ""})
    list(run.train())
    server = choose(run, "sides", *["left"] * 5, before=True)
    choose(tiny_run("untrained"), "before", "tie", limit=1)
    choose(run, "after", "tie", limit=1)
    sides, before, after = (images(tmp_path / name) for name in ("sides", "before", "after"))
    assert sides["000000_0_0.png"] == after["000000_0_0.png"] != sides["000000_0_1.png"] == before["000000_0_0.png"]
    named = [json.loads(line)["preferred"] for line in (tmp_path / "sides" / "pairs.jsonl").read_text().splitlines()]
    count = named.count("after")
    assert server.summary() == f"5 pairs; preferred: after training {count}, before training {5 - count}"
    assert f"model.adapter={run.folder}" in train_command(run, tmp_path / "x")
    assert "model.adapter" not in train_command(run, tmp_path / "x", before=True)
    with pytest.raises(ConfigError, match="its images were made with before = True, found False"):
        open_prefer(run, tmp_path / "sides")


def test_the_suggested_command_can_be_typed_also_for_a_folder_with_a_blank(tiny_run: MakeRun) -> None:
    command = train_command(tiny_run(), Path("my choices"))
    assert command.endswith("--set 'data.pairs=my choices'") and " --model " in command
    assert train_command(load(), Path("c")) == "alignkit train --algo diffusion_dpo --set data.pairs=c"


def test_the_command_goes_on_and_says_what_was_written(
    tiny_run: MakeRun, tiny_lcm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_run()  # its prompts are written
    out = tmp_path / "choices"
    arguments = ["prefer", str(tiny_lcm), "--out", str(out), "--prompts", str(tmp_path / "prompts.txt"), "--port", "0"]
    arguments += ["--limit", "2", "--steps", "1"]

    def person(server: Chooser) -> None:
        answered(server, "right")
        raise KeyboardInterrupt

    monkeypatch.setattr(Chooser, "serve_forever", person)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    for done, end in enumerate((f"{out}: 1 pair; 1 of 2 left", f"{out}: 2 pairs; all are answered")):
        result = CliRunner().invoke(app, arguments)
        url, ended, train = result.stdout.splitlines()
        before = ", 1 of them answered before" if done else ""
        assert url.startswith("open http://127.0.0.1:") and url.endswith(f" in a browser: 2 pairs{before}; Ctrl-C ends")
        assert (result.exit_code, ended) == (0, end)
        assert train == f"train on them: alignkit train --algo diffusion_dpo --model {tiny_lcm} --set data.pairs={out}"
    again = CliRunner().invoke(app, arguments)  # nothing is left to show, so no page is opened
    assert again.exit_code == 0 and again.stdout.splitlines() == [end, train]
    for flags, message in (
        (["--seed", "1"], "with seed = 0, found 1"),
        (["--steps", "2"], "with steps = 1, found 2"),
        (["--set", "model.guidance_scale=3.0"], "with weights and other settings = "),
        (["--out", str(tmp_path)], "exists already, without prefer.json; choose another folder"),
        (["--port", "-1"], "--port -1: expected 1 to 65535"),
        (["--steps", "0"], "found 0, expected"),
    ):
        refused = CliRunner().invoke(app, [*arguments, *flags])
        assert refused.exit_code == 1 and message in refused.stderr, refused.output
        assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1


def test_a_failure_to_generate_ends_the_command_after_the_count(
    tiny_run: MakeRun, tiny_lcm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise AlignkitError("out of memory; take a smaller model")

    tiny_run()  # its prompts are written
    monkeypatch.setattr("alignkit.serving.prefer.sample_images", fail)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    out, prompts = tmp_path / "choices", tmp_path / "prompts.txt"
    result = CliRunner().invoke(
        app, ["prefer", str(tiny_lcm), "--out", str(out), "--prompts", str(prompts), "--port", "0"]
    )
    assert (result.exit_code, result.stderr) == (1, "error: out of memory; take a smaller model\n")
    assert result.stdout.splitlines()[-1] == f"{out}: 0 pairs; 5 of 5 left"
