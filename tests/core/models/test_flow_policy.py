"""A third party's policy, a flow-matching model of points, through the ordinary run path."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import alignkit
from alignkit.commands.check_plugin import check_plugin
from alignkit.commands.prepare import prepare
from alignkit.config.bundles import find_bundle, find_policy
from alignkit.errors import ConfigError
from alignkit.interfaces import Policy
from alignkit.records import PolicySettings
from alignkit.registry import default_registry
from alignkit.rollout import sample_images
from alignkit.testing import check_policy, check_sampler
from alignkit_samplers.ddim import DDIM
from run_fixtures import assert_same_state

TEXTS = ["a point", "another point", "here", "there"]


@pytest.fixture
def run(flow_points: None, tmp_path: Path) -> Callable[..., alignkit.Run]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS), encoding="utf-8")

    def make(algorithm: str, **overrides: Any) -> alignkit.Run:
        settings = {
            "model.name": "points", "algorithm.name": algorithm, "algorithm.samples": 16, "data.prompts": str(prompts),
            "data.batch_size": 4, "train.learning_rate": 2e-3, "train.updates": 60, "train.rows_per_update": 128,
            "train.ema_decay": 0.9,
            "train.checkpoint_every": 0, "evaluate.prompts": str(prompts), "evaluate.samples": 16,
            "evaluate.steps": [2], "evaluate.every": 0, "output": str(tmp_path / algorithm),
        }  # fmt: skip
        return alignkit.load(None, settings | overrides)

    return make


def test_it_keeps_every_promise_that_a_plugin_gives(flow_points: None) -> None:
    found = {(verdict.kind, verdict.name): verdict for verdict in check_plugin("flow-points")}
    assert {key: (verdict.status, verdict.detail) for key, verdict in found.items() if verdict.kind == "policy"} == {
        ("policy", "flow_points"): ("passed", "model points")
    }
    assert {verdict.status for verdict in found.values()} == {"passed"}, found
    assert {kind for kind, _ in found} == {"policy", "model", "reward", "surrogate", "recipe"}


@pytest.mark.parametrize("name", ["ddim", "euler_ancestral", "renoise"])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_samplers_keep_their_promises_on_float_times_that_end_without_any_image(
    flow_points: None, name: str, spacing: str
) -> None:
    source = find_bundle("points").path
    policy = find_policy(source).load(source, PolicySettings(lora_rank=0))
    assert [float(level) for level in policy.schedule(policy.times()[-1])] == [0.0, 1.0]
    check_sampler(default_registry().get("sampler", name)(num_steps=3, spacing=spacing), policy)


def test_a_stochastic_rollout_keeps_the_noise_that_the_schedule_states(flow_points: None) -> None:
    # alpha^2 + sigma^2 is less than 1 here, and the deviation of a step that is right for 1 would add too much noise.
    source = find_bundle("points").path
    policy = find_policy(source).load(source, PolicySettings(lora_rank=0))
    x, prompt = torch.zeros(3, *policy.latent_shape), policy.encode(TEXTS[:3])
    sampler = DDIM(3, eta=1.0)
    with torch.no_grad():
        step = sampler.transition(policy, x, torch.arange(3), prompt)
    t = sampler.grid(policy)
    following = torch.cat([t[1:], policy.times()[:1]])
    assert bool((step.std <= following).all()) and bool((step.std > 0).all())
    ratio = (following / (1 - following)) / (t / (1 - t))
    assert torch.allclose(step.std, following * (1 - ratio**2).sqrt(), rtol=1e-4)


@pytest.mark.parametrize(("algorithm", "learning_rate"), [("ddpo", 5e-3), ("lasro", 1e-3)])
def test_training_raises_its_reward(run: Callable[..., alignkit.Run], algorithm: str, learning_rate: float) -> None:
    trained = run(algorithm, **{"train.learning_rate": learning_rate})
    start = {name: p.detach().clone() for name, p in trained.load_policy().weights().items()}
    rewards = [update.reward for update in trained.train()]
    assert all(map(math.isfinite, rewards))
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 0.15
    rows = alignkit.evaluate([trained], seen=False)
    (reward,) = [row for row in rows if row.reward == "rightness"]
    (drift,) = [row for row in rows if row.reward == "drift"]
    assert reward.low > 0.03 and math.isfinite(drift.after) and drift.after > 0
    # What the run leaves is a checkpoint, which is a model by itself.
    exported = find_policy(str(trained.folder)).load(str(trained.folder), PolicySettings(lora_rank=0))
    assert all(bool((exported.weights()[name] != p).any()) for name, p in start.items())
    policy, seeds = trained.policy(), [(7, i) for i in range(4)]
    with policy.using(trained.weights):
        images = sample_images(policy, trained.sampler(), TEXTS, seeds)
    assert torch.equal(sample_images(exported, trained.sampler(), TEXTS, seeds), images)


def test_a_recipe_of_the_plugin_is_in_force_from_the_first_line_of_the_run_to_its_evaluation(
    run: Callable[..., alignkit.Run],
) -> None:
    console = Console(file=io.StringIO(), width=100)
    trained = run("lasro", **{"recipe": "points-taught-first", "train.updates": 1})
    list(trained.train(console))
    assert console.file.getvalue().partition("\n")[0].endswith("; recipe points_taught_first, not the paper's")
    steps = [json.loads(line)["step"] for line in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps.count(0) == 2 + 3  # the evaluation and the point before training, and the warm-up
    rows = alignkit.evaluate([trained], steps=[2], seen=False)
    assert {row.departure for row in rows} == {"recipe points_taught_first, not the paper's"}
    untrained = alignkit.evaluate([run("ddpo")], steps=[2], seen=False)
    assert {row.departure for row in untrained} == {""}


def test_a_resumed_run_keeps_the_settings_of_a_recipe_that_has_changed_since(
    run: Callable[..., alignkit.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[algorithm]\nname = "ddpo"\n[train]\nlearning_rate = 1e-3\n', encoding="utf-8")
    row = replace(default_registry().find("recipe", "points_taught_first"), target=str(recipe))
    monkeypatch.setitem(default_registry()._rows, ("recipe", row.name), row)
    settings = {"recipe": row.name, "train.updates": 4, "train.checkpoint_every": 2, "evaluate.limit": 1}
    whole = run("ddpo", **settings, output=str(tmp_path / "whole"))
    list(whole.train())
    stopped = run("ddpo", **settings)
    for update in stopped.train():
        if update.step == 2:
            stopped.stop()
    recipe.write_text('[algorithm]\nname = "ddpo"\n[model]\nguidance_scale = 2.0\n', encoding="utf-8")
    resumed = alignkit.load(resume=stopped.folder)
    assert (resumed.config.recipe, resumed.config.model.guidance_scale) == (row.name, None)
    assert [update.step for update in resumed.train()] == [3, 4]
    assert_same_state(whole.folder, stopped.folder)


def test_a_resumed_run_goes_on_with_it(run: Callable[..., alignkit.Run]) -> None:
    stopped = run("ddpo", **{"train.updates": 4, "train.checkpoint_every": 2})
    for update in stopped.train():
        if update.step == 2:
            stopped.stop()
    resumed = alignkit.load(resume=stopped.folder)
    assert [update.step for update in resumed.train()] == [3, 4]


def test_a_folder_with_its_checkpoint_is_a_model_without_a_name(run: Callable[..., alignkit.Run]) -> None:
    source = find_bundle("points").path
    assert find_bundle(source).defaults == {"sampler": {"name": "ddim", "num_steps": 10, "eta": 0.0}}
    own = {"model.name": source, "model.lora_rank": 0, "reward": ["rightness"]}
    plain = run("ddpo", **own, **{"sampler.eta": 1.0, "sampler.num_steps": 2})
    plain.check()
    assert type(plain.load_policy()).__name__ == "FlowPoints"
    assert [image.size for image in alignkit.runs.run.open_run(source, {"model.lora_rank": 0}).sample(["here"])] == [
        (16, 16)
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.lora_rank": 4}, r"^model\.lora_rank: found 4, expected 0; flow_points has no adapters$"),
        ({"model.prediction": "epsilon"}, r"^model\.prediction: found 'epsilon', expected none for flow_points$"),
        ({"model.unet": "owner/unet"}, r"^model\.unet: found 'owner/unet', expected none for flow_points$"),
        ({"sampler.name": "lcm"}, r"^sampler\.name: found lcm, which is for latent consistency models, and points is"),
        ({"model.policy": "diffusers"}, r"^model: .* .* holds no diffusers pipeline"),
        ({"sampler.name": "renoise", "sampler.num_steps": 50}, r"^sampler\.num_steps: found 50, expected 1 to 49"),
        ({"model.policy": "flow"}, r"^unknown policy 'flow'; did you mean flow_points\?"),
    ],
)
def test_settings_that_it_cannot_follow_are_one_line(
    run: Callable[..., alignkit.Run], overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(alignkit.errors.AlignkitError, match=message):
        run("ddpo", **overrides).check()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sampler.name": "lcm", "sampler.num_steps": 2}, r"sampler\.name: found lcm, which is for latent consistency"),
        ({"sampler.num_steps": 50}, r"sampler\.num_steps: found 50, expected 1 to 49"),
    ],
)
def test_what_a_policy_does_not_say_before_is_refused_once_it_is_loaded(
    run: Callable[..., alignkit.Run], monkeypatch: pytest.MonkeyPatch, overrides: dict[str, Any], message: str
) -> None:
    policy = find_policy(find_bundle("points").path)
    monkeypatch.setattr(policy, "facts", Policy.facts)
    silent = run("ddpo", **overrides)
    silent.check()
    with pytest.raises(ConfigError, match=message):
        list(silent.train())


def test_the_policy_of_the_plugin_is_checked_when_frozen_too(flow_points: None) -> None:
    source = find_bundle("points").path
    check_policy(find_policy(source).load(source, PolicySettings(trainable=False)))


def test_preparing_a_model_that_caches_nothing_says_so(run: Callable[..., alignkit.Run], tmp_path: Path) -> None:
    prepared, notes = prepare(run("ddpo", **{"data.cache": str(tmp_path / "cache")}))
    assert [(one.what, one.read, one.encoded, one.entries) for one in prepared] == [("texts", 5, 0, 0)]
    assert notes == ["data.cache: the model points keeps nothing there, so nothing was prepared"]


def test_a_policy_without_named_layers_is_refused_by_a_method_that_compares_features(run: Callable[..., Any]) -> None:
    changes = {"sampler.name": "renoise", "sampler.num_steps": 1, "algorithm.feature_time": 5}
    with pytest.raises(ConfigError, match=r"^layers: found down_blocks\.2, .*, expected none: \w+ names no layers$"):
        list(run("drpo", **changes).train())
