"""The weights that a run exports in the end: of its best point, or of its last update."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import alignkit
from alignkit.commands.evaluate import evaluate
from alignkit.errors import ConfigError
from alignkit.runs.run import Run
from points_fixtures import LCD, LORA, choice_of, points, prefer
from run_fixtures import PROMPTS, final_state, metrics

MakeRun = Callable[..., Run]


def test_the_weights_of_the_best_point_are_exported_and_evaluated(
    tiny_run: MakeRun, steady: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer(2, monkeypatch)
    run = tiny_run(overrides=points())
    console = Console(file=StringIO(), width=200)
    list(run.train(console))
    exported = (run.folder / LORA).read_bytes()
    assert exported == (run.folder / "points" / "000002" / LORA).read_bytes()
    assert exported != (run.folder / "points" / "000004" / LORA).read_bytes()
    text = "exports the average weights of update 2 of 4: for the test"
    assert choice_of(run.folder) == {"step": 4, "exported": 2, "weights": "best", "text": text}
    assert isinstance(console.file, StringIO)
    assert text in console.file.getvalue() and "after 2 of 4 updates" in console.file.getvalue()
    again = alignkit.load(resume=run.folder)
    assert_same_samples(run, again)
    (rows,) = [r["evaluation"] for r in metrics(run.folder) if "evaluation" in r and r["step"] == 4]
    found = {(row.reward, row.num_steps): row.after for row in evaluate([again], seen=False)}
    for row in rows:
        assert found[row["reward"], row["num_steps"]] == pytest.approx(row["after"], abs=1e-6)


def assert_same_samples(one: Run, other: Run) -> None:
    first, second = (np.stack([np.asarray(i) for i in run.sample(PROMPTS[:2])]) for run in (one, other))
    assert np.array_equal(first, second)


@pytest.mark.parametrize(("export", "source"), [("average", "average"), ("last", "policy")])
def test_the_last_update_is_exported_averaged_or_not_and_points_change_nothing(
    tiny_run: MakeRun, steady: Any, export: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer(2, monkeypatch)
    run = tiny_run("run", points({"train.export": export}))
    plain = tiny_run("plain", points({"train.export": export, "evaluate.points": 0}))
    for one in (run, plain):
        list(one.train())
    assert choice_of(run.folder)["exported"] == 4 and choice_of(run.folder)["weights"] == export
    state = final_state(run.folder)["trainer"]
    assert all(torch.equal(run.weights[name], value) for name, value in state[source].items())
    assert any(not torch.equal(state["policy"][name], value) for name, value in state["average"].items())
    exported = load_file(run.folder / LORA)
    assert len(exported) == len(state[source])
    assert all(any(torch.equal(value, other) for other in exported.values()) for value in state[source].values())
    assert (run.folder / LORA).read_bytes() == (plain.folder / LORA).read_bytes()
    assert [r for r in metrics(run.folder) if "point" not in r] == metrics(plain.folder)
    assert_same_samples(run, alignkit.load(resume=run.folder))


def test_the_rule_follows_from_points_and_held_out_rewards(tiny_run: MakeRun, steady: Any) -> None:
    def rule(overrides: dict[str, Any]) -> str:
        from alignkit.runs.display import Display
        from alignkit.runs.loop import Loop

        run = tiny_run(overrides=points({**overrides}))
        return Loop(run, run.folder, run.accelerator(), Display(None, 1)).export_rule

    assert rule({}) == "best"
    assert rule({"evaluate.rewards": []}) == "average"
    assert rule({"evaluate.points": 0}) == "average"
    assert rule(LCD) == "average"
    assert rule({"evaluate.rewards": [], "train.export": "best"}) == "best"
    for overrides in ({"evaluate.points": 0}, {"evaluate.prompts": ""}, LCD):
        with pytest.raises(ConfigError, match=r'^train\.export: found "best", .* expected evaluate\.points above 0'):
            tiny_run(overrides=points({"train.export": "best", **overrides})).check()


def test_if_no_point_qualifies_the_average_of_the_end_is_exported_and_the_run_says_so(
    tiny_run: MakeRun, steady: Any
) -> None:
    run = tiny_run(overrides=points({"evaluate.points_limit": 4}))
    list(run.train())
    assert choice_of(run.folder) == {
        "step": 4, "exported": 4, "weights": "average",
        "text": "exports the average weights of update 4 of 4: no point has a trained reward on at least 5 prompts",
    }  # fmt: skip
    assert (run.folder / LORA).read_bytes() == (run.folder / "points" / "000004" / LORA).read_bytes()
    assert_same_samples(run, alignkit.load(resume=run.folder))


def test_full_fine_tuning_keeps_no_weights_at_points_but_exports_the_best(
    tiny_run: MakeRun, steady: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer(1, monkeypatch)
    run = tiny_run(overrides=points({"model.lora_rank": 0, "train.updates": 2, "train.learning_rate": 1e-3}))
    list(run.train())
    assert {path.suffix for path in (run.folder / "points" / "000001").iterdir()} == {".png", ".json"}
    best = final_state(run.folder)["run"]["points"]["best"]
    exported = load_file(run.folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert choice_of(run.folder)["exported"] == 1
    assert best.keys() == exported.keys() and all(torch.equal(exported[name], value) for name, value in best.items())
