"""Whole runs on several rewards: how they end when one fails, and that they resume with the same bits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from typer.testing import CliRunner

import alignkit
from alignkit.cli.app import app
from alignkit.errors import AlignkitError, ConfigError, PluginError, TransientError
from alignkit.models.diffusers_policy import DiffusersPolicy
from alignkit.records import Example
from alignkit.runs.run import Run
from alignkit.training import checkpoint
from alignkit_rewards.jpeg import JpegCompressibility
from method_checks import assert_a_stopped_run_ends_with_the_same_bits
from plugin_fixtures import PluginFolder
from run_fixtures import assert_same_but_surroundings, metrics

MakeRun = Callable[..., Run]

BACKENDS = """
    from alignkit import hookimpl

    @hookimpl
    def register_rewards(register):
        register("backend", "backends.rewards:Backend", "A slow reward on a server that can be switched off")
        register("redness", "backends.rewards:Redness", "Mean of red minus the others")
        register("darkness", "backends.rewards:Darkness", "Minus the mean of all pixels")
        register("hundredth", "backends.rewards:Hundredth", "NaN for one image in ten, by its content")
        register("nonsense", "backends.rewards:Nonsense", "Answers what is no answer once it is down")
"""

BACKEND_CLASSES = """
    import torch
    from alignkit.errors import TransientError
    from alignkit.interfaces import Reward
    from alignkit.records import Scores

    SCORED = []
    "The texts of all calls that were answered."
    DOWN_AFTER = None
    "How many calls are answered before the server is gone; None: all."


    class Backend(Reward):
        slow = True

        def fingerprint(self):
            return "backend 1"

        def __call__(self, images, examples):
            if DOWN_AFTER is not None and len(SCORED) >= DOWN_AFTER:
                raise TransientError("no server at 127.0.0.1:8188 (connection refused)")
            SCORED.append([e.text for e in examples])
            return images.mean((1, 2, 3)) * 8 // 1e-3 / 1e3


    class Redness(Reward):
        def __call__(self, images, examples):
            return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


    class Darkness(Reward):
        def __call__(self, images, examples):
            return -images.mean((1, 2, 3))


    class Hundredth(Reward):
        def __call__(self, images, examples):
            values = images.mean((1, 2, 3))
            return torch.where((values * 1e4).long() % 10 == 0, torch.nan, values)


    class Nonsense(Backend):
        def __call__(self, images, examples):
            if DOWN_AFTER is None or len(SCORED) < DOWN_AFTER:
                return super().__call__(images, examples)
            return ["As a language model I would rather not say"] * len(images)
"""

DDPO = {
    "algorithm.name": "ddpo", "algorithm.samples": 4, "algorithm.baseline": "batch", "train.updates": 3,
    "train.rows_per_update": 8, "evaluate.prompts": "", "train.checkpoint_every": 0, "scoring.retry_seconds": 0.0,
    "evaluate.batch_size": 3,
}  # fmt: skip


@pytest.fixture
def backends(plugins: PluginFolder) -> Any:
    """The module of these rewards, which can switch the server off."""
    plugins.install("backends", BACKENDS, rewards=BACKEND_CLASSES)
    import backends.rewards

    return backends.rewards


def steps(folder: Path) -> list[Mapping[str, Any]]:
    return [record for record in metrics(folder) if "reward" in record]


def same_run(one: Run, other: Run) -> None:
    assert_same_but_surroundings(one.folder, other.folder)


def test_a_server_killed_in_the_middle_costs_nothing(tiny_run: MakeRun, backends: Any) -> None:
    """It dies in the middle of a round: the run is saved as the round began, what was answered is kept, and the resumed
    run scores the rest alone and ends as if nothing had happened."""
    settings = {**DDPO, "reward": [{"name": "backend"}, {"name": "redness", "weight": 0.3}]}
    unbroken, broken = tiny_run("unbroken", settings), tiny_run("broken", settings)
    list(unbroken.train())
    once = list(backends.SCORED)
    each = len(once) // 3
    assert each >= 3
    backends.SCORED.clear()
    backends.DOWN_AFTER = each + each - 1
    with pytest.raises(TransientError) as caught:
        list(broken.train())
    assert str(caught.value) == (
        "reward 'backend' (plugin backends of backends 1.0) failed after 5 attempts in 0 seconds: "
        "no server at 127.0.0.1:8188 (connection refused); "
        f"resume with: alignkit train --resume {broken.folder}"
    )
    saved = checkpoint.latest(broken.folder / "checkpoints")
    assert saved is not None and checkpoint.load(saved)["trainer"]["update"] == len(steps(broken.folder))
    backends.DOWN_AFTER = None
    result = CliRunner().invoke(app, ["train", "--resume", str(broken.folder), "--quiet"])
    assert result.exit_code == 0, result.output
    assert once == backends.SCORED
    same_run(unbroken, broken)


def test_a_server_that_is_away_for_a_moment_is_not_even_noticed(
    tiny_run: MakeRun, backends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, broken = (tiny_run(name, {**DDPO, "reward": ["backend"]}) for name in ("unbroken", "broken"))
    list(unbroken.train())
    backends.SCORED.clear()
    backends.DOWN_AFTER = 4
    monkeypatch.setattr("alignkit.rewards.checked.wait", lambda closed, seconds: setattr(backends, "DOWN_AFTER", None))
    list(broken.train())
    same_run(unbroken, broken)


def test_a_server_that_dies_in_an_evaluation_loses_neither_the_update_nor_the_evaluation(
    tiny_run: MakeRun, backends: Any, tmp_path: Path
) -> None:
    settings = {
        **DDPO, "reward": ["redness"], "evaluate.rewards": ["backend"],
        "evaluate.prompts": str(tmp_path / "prompts.txt"), "evaluate.every": 1, "evaluate.steps": [2],
        "algorithm.baseline": "batch",
    }  # fmt: skip
    unbroken, broken = tiny_run("unbroken", settings), tiny_run("broken", settings)
    list(unbroken.train())
    backends.SCORED.clear()
    backends.DOWN_AFTER = 1
    with pytest.raises(TransientError, match="resume with: alignkit train --resume"):
        list(broken.train())
    backends.DOWN_AFTER = None
    list(alignkit.load(resume=broken.folder).train())
    same_run(unbroken, broken)
    assert [r["verdict"] for r in metrics(broken.folder) if "verdict" in r]


def test_threads_change_no_bit(tiny_run: MakeRun, backends: Any, tmp_path: Path) -> None:
    """With a surrogate, replay and evaluation, on policy as ever."""
    settings = {"reward": ["backend", "redness"], "train.updates": 2, "evaluate.rewards": ["darkness"]}
    runs = [tiny_run(str(overlap), {**settings, "scoring.overlap": overlap}) for overlap in (True, False)]
    for run in runs:
        list(run.train())
    same_run(*runs)


@pytest.mark.parametrize(
    "scoring",
    [
        {"scoring.combine": "normalised"},
        {"scoring.combine": "advantage", "reward.redness.at_least": "start", "scoring.start_rounds": 1},
        {"scoring.combine": "normalised", "reward.redness.at_least": 0.5},
    ],
    ids=["normalised", "advantage", "floor"],
)
def test_a_stopped_run_on_several_rewards_ends_with_the_same_bits(
    tiny_run: MakeRun, backends: Any, brightness: None, scoring: dict[str, Any]
) -> None:
    settings = {**DDPO, "reward": ["brightness", {"name": "redness", "weight": 0.2}], **scoring}
    assert_a_stopped_run_ends_with_the_same_bits(tiny_run, settings)


def test_metrics_hold_each_reward_its_floor_and_its_multiplier(
    tiny_run: MakeRun, backends: Any, brightness: None
) -> None:
    settings = {**DDPO, "reward": ["brightness", {"name": "redness", "weight": 0.2, "at_least": 0.5}]}
    run = tiny_run(overrides={**settings, "scoring.combine": "normalised"})
    updates = list(run.train())
    for update in updates:
        m = update.metrics
        assert m["reward"] == pytest.approx(m["reward/brightness"] + 0.2 * m["reward/redness"], abs=1e-5)
    later = updates[-1].metrics
    assert later["reward/redness/floor"] == 0.5 and later["reward/redness/multiplier"] > 0


def test_one_image_in_ten_that_is_no_number_ends_the_run_or_is_left_out(tiny_run: MakeRun, backends: Any) -> None:
    settings = {**DDPO, "reward": ["hundredth"], "train.updates": 12}
    stopped = tiny_run("stopped", settings)
    with pytest.raises(PluginError, match=r"'hundredth' .* returned nan for image \d+, '.*scoring\.on_error=skip"):
        list(stopped.train())
    assert checkpoint.latest(stopped.folder / "checkpoints") is not None
    run = tiny_run("going on", {**settings, "scoring.on_error": "skip"})
    updates = list(run.train())
    assert len(updates) == 12 and all(math.isfinite(u.reward) for u in updates if "reward" in u.metrics)
    assert any(0 < u.metrics.get("unscored", 0) < 1 for u in updates)
    warnings = [r["warning"] for r in metrics(run.folder) if "warning" in r]
    assert sum("not finite" in text for text in warnings) == 1
    # What the message says can be done, and leads to where the other run is.
    go_on = ["train", "--resume", str(stopped.folder), "--set", "scoring.on_error=skip", "--quiet"]
    result = CliRunner().invoke(app, go_on)
    assert result.exit_code == 0, result.output
    same_run(stopped, run)
    assert alignkit.load(resume=stopped.folder).config.scoring.on_error == "skip"


def test_a_resumed_run_takes_settings_of_retries_and_nothing_else(tiny_run: MakeRun, backends: Any) -> None:
    run = tiny_run(overrides={**DDPO, "reward": ["backend"], "train.updates": 1})
    list(run.train())
    written = (run.folder / "run.toml").read_text()
    patient = {"scoring.retries": 9, "scoring.retry_seconds": 0.5, "scoring.retry_limit": 60.0}
    resumed = alignkit.load(resume=run.folder, overrides=patient)
    assert resumed.config.scoring.retries == 9 and (run.folder / "run.toml").read_text() == written
    list(resumed.train())
    again = alignkit.load(resume=run.folder).config
    assert (again.scoring.retries, again.scoring.retry_seconds, again.scoring.retry_limit) == (9, 0.5, 60.0)
    assert replace(again, scoring=run.config.scoring) == run.config
    for refused in ({"train.updates": 9}, {**patient, "scoring.combine": "normalised"}, {"scoring.cache": "elsewhere"}):
        message = (
            r"keeps its own settings; .* except --set of scoring\.on_error, scoring\.retries, scoring\.retry_limit"
        )
        with pytest.raises(ConfigError, match=message):
            alignkit.load(resume=run.folder, overrides=refused)


def test_a_reward_that_answers_nonsense_is_named_and_the_run_can_be_resumed(tiny_run: MakeRun, backends: Any) -> None:
    run = tiny_run(overrides={**DDPO, "reward": ["nonsense"]})
    backends.DOWN_AFTER = 5
    with pytest.raises(PluginError, match=r"reward 'nonsense' \(.*\) returned list, expected a tensor") as caught:
        list(run.train())
    assert "\n" not in str(caught.value) and "--resume" in str(caught.value)
    done = [r["step"] for r in steps(run.folder)]
    backends.DOWN_AFTER = None
    list(alignkit.load(resume=run.folder).train())
    assert 0 < len(done) < 3 and [r["step"] for r in metrics(run.folder) if "loss" in r] == [1, 2, 3]


def test_advantages_apart_need_a_method_that_takes_them(tiny_run: MakeRun, backends: Any) -> None:
    settings = {"reward": ["redness", "darkness"], "scoring.combine": "advantage"}
    with pytest.raises(ConfigError, match="algorithm lasro learns from rewards, not from advantages"):
        tiny_run(overrides=settings).check()
    tiny_run("fine", {**DDPO, **settings}).check()


@pytest.mark.parametrize("algorithm", ["ddpo", "rebel", "sdpo"])
def test_methods_that_take_advantages_take_them_apart(
    make_trainer: Any, backends: Any, brightness: None, algorithm: str
) -> None:
    """With equal rewards under two names the advantages are those of one, whatever their scale."""
    overrides = {
        "algorithm.name": algorithm,
        "data.batch_size": 2,
        "evaluate.prompts": "",
        "algorithm.baseline": "batch",
    }

    def advantages(rewards: list[Any], scoring: dict[str, Any]) -> Any:
        trainer = make_trainer({**overrides, "reward": rewards, **scoring}, ddim=True)
        from method_checks import collect

        found = collect(trainer)
        return found.advantages if algorithm == "rebel" else found.advantage

    one = advantages(["brightness"], {})
    both = advantages(["brightness", {"name": "backend", "weight": 100.0}], {"scoring.combine": "advantage"})
    assert one.shape == both.shape
    assert float((one - both).abs().max()) < 0.1 * float(one.abs().max())


def test_a_held_out_reward_that_falls_is_reported_live_at_the_end_and_by_evaluate(
    tiny_run: MakeRun, backends: Any, brightness: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brightness is trained on, its negative is held out: whatever is gained by one is lost by the other."""

    def decode(self: Any, latents: Tensor) -> Tensor:
        return interpolate((latents[:, :3] / 4).sigmoid(), scale_factor=8.0)

    monkeypatch.setattr(DiffusersPolicy, "decode", decode)  # a decoder without training hardly shows what is learned
    settings = {
        "algorithm.name": "rg_lcd", "algorithm.proxy": False, "algorithm.beta": 50.0, "reward": ["brightness"],
        "train.updates": 4, "train.learning_rate": 3e-2, "train.ema_decay": 0.0, "evaluate.rewards": ["darkness"],
        "evaluate.every": 2, "evaluate.limit": 5, "evaluate.steps": [1],
    }  # fmt: skip
    run = tiny_run(overrides=settings)
    list(run.train())
    found = [(r["step"], r["verdict"]) for r in metrics(run.folder) if "verdict" in r]
    assert found == [(2, "hacking"), (4, "hacking")]
    result = CliRunner().invoke(app, ["evaluate", str(run.folder), "--unseen"])
    assert result.exit_code == 0, result.output
    assert "run, unseen prompts: reward hacking: the trained reward rises while a held-out one falls" in result.output
    (rows,) = [r["evaluation"] for r in metrics(run.folder) if "evaluation" in r and r["step"] == 4]
    assert {row["reward"]: row["held_out"] for row in rows} == {"reward": False, "brightness": False, "darkness": True}


def test_a_floor_is_a_number_or_the_start(tiny_run: MakeRun, backends: Any) -> None:
    with pytest.raises(ConfigError, match=r'reward\.at_least: found "begin", expected number or "start"'):
        tiny_run(overrides={"reward": ["darkness", {"name": "redness", "at_least": "begin"}]})
    run = tiny_run(overrides={"reward": ["darkness", "redness"], "reward.redness.at_least": -1})
    assert [reward.at_least for reward in run.config.rewards] == [None, -1.0]


def test_a_held_out_reward_is_built_with_its_fields(tiny_run: MakeRun) -> None:
    held_out: list[Any] = [{"name": "jpeg_compressibility", "quality": 50}, "jpeg_incompressibility"]
    run = tiny_run("fields", {"reward": ["jpeg_incompressibility"], "evaluate.rewards": held_out})
    rewards = run.with_measured()
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = rewards(image, [Example("noise")]).parts
    expected = JpegCompressibility(quality=50)(image, [Example("noise")])
    assert rewards.held_out == ["jpeg_compressibility"]
    assert torch.equal(found["jpeg_compressibility"], expected)
    assert not torch.equal(found["jpeg_compressibility"], -found["jpeg_incompressibility"])


def test_what_is_only_held_out_decides_nothing(tiny_run: MakeRun, odd_rewards: None, brightness: None) -> None:
    plain, measuring = (
        tiny_run("plain", {"train.updates": 1}),
        tiny_run("held_out", {"train.updates": 1, "evaluate.rewards": ["unscored"]}),
    )
    for run in (plain, measuring):
        list(run.train())
    files = [next(run.folder.glob("*.safetensors")).read_bytes() for run in (plain, measuring)]
    assert files[0] == files[1]
    totals = [
        [row for r in metrics(run.folder) if "evaluation" in r for row in r["evaluation"] if row["reward"] == "reward"]
        for run in (plain, measuring)
    ]
    assert json.dumps(totals[0]) == json.dumps(totals[1])


def test_a_cache_can_be_shared_between_runs(tiny_run: MakeRun, backends: Any, tmp_path: Path) -> None:
    settings = {**DDPO, "reward": ["backend"], "scoring.cache": str(tmp_path / "all.sqlite")}
    first, second = tiny_run("first", settings), tiny_run("second", settings)
    list(first.train())
    scored = len(backends.SCORED)
    list(second.train())
    assert len(backends.SCORED) == scored > 0 and not (second.folder / "scores.sqlite").exists()
    same_run(first, second)


def test_an_error_of_the_run_itself_states_how_to_resume(tiny_run: MakeRun, odd_rewards: None) -> None:
    with pytest.raises(
        AlignkitError,
        match=r"from: no image could be scored \(unscored: no reader\);.*resume with: alignkit train --resume",
    ):
        list(tiny_run(overrides={**DDPO, "reward": ["unscored"]}).train())
