"""The ablations of LaSRO's paper: the options in the docs are accepted, each trains and changes what it names."""

from __future__ import annotations

import itertools
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import alignkit
from alignkit.config.toml import parse_assignment
from alignkit.errors import ConfigError
from alignkit.interfaces import Reward
from alignkit.records import Example
from alignkit.registry import default_registry
from alignkit.rollout import States
from alignkit.runs.run import Run
from alignkit.testing import check_algorithm
from alignkit.testing.algorithm import assert_goes_on_from_its_checkpoint, tiny_trainer
from alignkit.testing.world import Form
from alignkit.training.trainer import Trainer
from alignkit_lasro.additions import ExtendedLaSRO
from alignkit_lasro.lasro import LaSRO
from alignkit_samplers.lcm import LCM
from alignkit_samplers.renoise import Renoise
from method_checks import (
    collect,
    copies,
    equal,
    gradient,
    updates,
    whole_updates,
)

MakeRun = Callable[..., Run]
MakeTrainer = Callable[..., Trainer]
PAGE = Path(__file__).parents[3] / "docs" / "algorithms" / "lasro.md"
ROW = re.compile(r"^\| \((\w)\) (.+?) \| `(--set .+?)` \|", re.MULTILINE)
TYPED = {f"{letter} {name}": options for letter, name, options in ROW.findall(PAGE.read_text(encoding="utf-8"))}
SMALL = {"surrogate.width": 32, "surrogate.layers": 2, "surrogate.heads": 2}
ALONE: dict[str, Any] = {"regulariser": []}
OF_REWARD = {"algorithm.gradient_of": "reward", **ALONE}
OF_IMAGES = {"algorithm.states_from": "images", **ALONE}


def options(typed: str) -> dict[str, Any]:
    return dict(parse_assignment(word) for word in shlex.split(typed) if word != "--set")


def test_the_docs_list_all_ablations_of_the_paper() -> None:
    assert sorted(name[0] for name in TYPED) == ["a", "a", "b", "c", "d", "e"]


@pytest.mark.parametrize("name", sorted(TYPED))
def test_the_options_of_the_docs_are_accepted_for_the_embedded_model(name: str, tmp_path: Path) -> None:
    given = {"algorithm.name": "lasro", "reward": [{"name": "attribute_binding"}], "output": str(tmp_path / "run")}
    alignkit.load(None, given | options(TYPED[name])).check()


@pytest.mark.parametrize("name", sorted(TYPED))
def test_an_ablation_trains(tiny_run: MakeRun, name: str) -> None:
    chosen = {key: value for key, value in options(TYPED[name]).items() if not key.startswith("reward.")}
    chosen |= {**SMALL, "surrogate.warmup": 1} if "surrogate.name" in chosen else {}
    run = tiny_run(overrides={**chosen, "train.updates": 2, "evaluate.prompts": ""})
    run.check()
    seen = [u for u in run.train() if u.step]
    assert [u.step for u in seen] == [1, 2]
    assert all(torch.tensor(list(u.metrics.values())).isfinite().all() for u in seen)
    assert "reward_loss" in seen[-1].metrics and (run.folder / "pytorch_lora_weights.safetensors").is_file()


class Corner(Reward):
    """The brightness of one corner: the means of images from an untrained decoder hardly differ."""

    differentiable = True

    def __call__(self, images: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor:
        return images[:, :, :8, :8].mean((1, 2, 3))


@pytest.mark.parametrize(
    ("fields", "turbo"),
    [
        ({"gradient_of": "reward"}, False), ({"states_from": "images"}, True),
        pytest.param({"gradient_of": "reward"}, True, marks=pytest.mark.long),
        pytest.param({"states_from": "images"}, False, marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_an_ablation_keeps_the_promises_of_an_algorithm(fields: Mapping[str, Any], turbo: bool) -> None:
    if turbo:
        check_algorithm(LaSRO(**fields), Renoise(2), form="teacher", reward=Corner())
    else:
        check_algorithm(ExtendedLaSRO(samples=3, **fields), reward=Corner())


@pytest.mark.parametrize("fields", [{}, {"gradient_of": "reward"}, {"states_from": "images"}])
@pytest.mark.parametrize("form", ["lcm", "turbo"])
def test_the_pull_to_the_model_before_training_works_within_an_ablation(
    fields: dict[str, Any], form: Form, tmp_path: Path
) -> None:
    reference = default_registry().get("regulariser", "reference")()
    sampler = LCM(2) if form == "lcm" else Renoise(2)

    def make(settings: Mapping[str, Any] | None = None) -> Trainer:
        torch.manual_seed(0)
        pull = [("reference", 0.5, reference)]
        return tiny_trainer(ExtendedLaSRO(samples=3, **fields), sampler, form=form, reward=Corner(), regularisers=pull)

    metrics = assert_goes_on_from_its_checkpoint(make, {}, tmp_path)
    assert all(m["reference_loss"] > 0 and math.isfinite(m["reward_loss"]) for m in metrics)
    trainer = make()
    list(trainer.round())
    with torch.no_grad():
        for parameter in trainer.ctx.policy.parameters():
            parameter += 0.05
    (rows,) = whole_updates(trainer)
    total, found = trainer.loss(rows)
    own, _ = trainer.algorithm.loss(rows.own, trainer.ctx)
    assert float(total.detach()) == pytest.approx(float((own + 0.5 * found["reference_loss"]).detach()), rel=1e-5)
    assert gradient(trainer, found["reference_loss"]).any()


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("shapes_lcm", {"states_from": "images"}), ("shapes_turbo", {"gradient_of": "reward"}),
        pytest.param("shapes_lcm", {"gradient_of": "reward"}, marks=pytest.mark.long),
        pytest.param("shapes_turbo", {"states_from": "images"}, marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_an_embedded_model_trains_an_ablation_with_the_pull_to_the_model_before_training(
    model: str, fields: dict[str, Any], tmp_path: Path, no_pages: None
) -> None:
    short = {"surrogate.warmup": 0} if "states_from" in fields else {}
    run = alignkit.load(None, short | {
        "algorithm.name": "lasro", "model.name": model, "regulariser": [{"name": "reference", "weight": 0.1}],
        "reward": [{"name": "attribute_binding", "mode": "soft"}], "data.batch_size": 2, "algorithm.samples": 2,
        "train.updates": 2, "train.rows_per_update": 4, "evaluate.prompts": "", "train.device": "cpu",
        "output": str(tmp_path / "run"), **{f"algorithm.{name}": value for name, value in fields.items()},
    })  # fmt: skip
    run.check()
    first, last = (update.metrics["reference_loss"] for update in run.train() if update.step)
    assert first == 0 < last


# (a) other backbones


@pytest.mark.parametrize("name", ["latent_clip", "latent_blip"])
def test_the_surrogate_of_a_model_is_not_the_beginning_of_another(name: str) -> None:
    own, other = (
        alignkit.load(None, {"algorithm.name": "lasro", **chosen}).config.surrogate
        for chosen in ({}, {"surrogate.name": name})
    )
    assert own is not None and own.name == "latent_unet" and own.init
    assert other is not None and other.name == name and not other.init


def test_the_proxy_of_rg_lcd_serves_as_a_surrogate(tiny_run: MakeRun) -> None:
    chosen = {**SMALL, "surrogate.name": "lrm", "surrogate.patch": 1, "train.updates": 1, "evaluate.prompts": ""}
    run = tiny_run(overrides=chosen)
    run.check()
    last = list(run.train())[-1]
    assert last.step == 1 and "surrogate_loss" in last.metrics and "reward_loss" in last.metrics


@pytest.mark.parametrize("name", ["latent_unet", "latent_clip", "latent_blip"])
def test_a_surrogate_learns_to_rank_samples_that_it_has_not_seen(make_trainer: MakeTrainer, name: str) -> None:
    trainer = make_trainer({
        "surrogate.name": name, "surrogate.warmup": 18, "surrogate.learning_rate": 3e-3, "algorithm.samples": 4,
        "algorithm.surrogate_steps": 2, "algorithm.pairs_per_update": 24, "data.batch_size": 5, **ALONE,
        **(SMALL if name != "latent_unet" else {}),
    })  # fmt: skip
    trainer.ctx.policy.decode = lambda latents: (latents[:, :3] / 20).sigmoid()  # type: ignore[method-assign]
    metrics = [update.metrics for _ in range(18) for update in trainer.round()]
    accuracy = [m["pair_accuracy"] for m in metrics[-5:]]
    assert sum(accuracy) / 5 > 0.8, accuracy


# (b) the alternative scheme


def test_states_are_captioned_images_noised_to_times_of_the_solver(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({**OF_IMAGES, "train.rows_per_update": 64})
    policy, batch, states = trainer.ctx.policy, trainer.batch(), (collected := collect(trainer)).states
    assert batch.images is not None
    assert len(states) == 64 and states.time is not None and set(states.step.tolist()) == {0}
    assert bool(((states.time + 1) % 20 == 0).all()) and len(states.time.unique()) > 20
    alpha, sigma = (column.view(-1, 1, 1, 1) for column in policy.schedule(states.time))
    noise = (states.x - alpha * policy.encode_images(batch.images)) / sigma
    assert float(noise.mean()) == pytest.approx(0, abs=0.02) and float(noise.std()) == pytest.approx(1, abs=0.02)
    with torch.no_grad():
        expected = policy.denoise(states.x, states.time, policy.encode([c.text for c in batch.captions]))
    assert torch.allclose(states.clean, expected, rtol=1e-4, atol=1e-4)
    assert states.prompt.examples == list(batch.captions)
    # The surrogate learns from trajectories as ever.
    assert collected.scored.latents.shape[:2] == (4, 3) and len(trainer.algorithm._memory.rounds) == 1  # type: ignore[attr-defined]


def test_noised_images_weigh_as_much_as_all_steps_together(make_trainer: MakeTrainer) -> None:
    found = []
    for weights in ([1.0, 1.0], [0.5, 2.0]):
        trainer = make_trainer({**OF_IMAGES, "algorithm.step_weights": weights})
        head: Any = trainer.ctx.surrogate.module()  # type: ignore[union-attr]
        with torch.no_grad():
            head.head[-1].weight.normal_(generator=torch.Generator().manual_seed(0))
        (rows,) = updates(trainer)
        method = trainer.algorithm
        assert isinstance(method, LaSRO) and len(method._trackers) == 1
        loss, _ = trainer.algorithm.loss(rows, trainer.ctx)
        with torch.no_grad():
            clean = trainer.ctx.policy.denoise(rows.x, rows.time, rows.prompt)
            scores = trainer.ctx.surrogate.score(clean, rows.prompt)  # type: ignore[union-attr]
        mean, top = method._trackers[0].bounds
        level = ((scores - mean) / (top - mean)).clamp(max=1)
        assert float(loss.detach()) == pytest.approx(-sum(weights) * float(level.mean()), rel=1e-3, abs=1e-4)
        found.append(gradient(trainer, loss))
    assert torch.allclose(found[1], found[0] * 2.5 / 2, rtol=1e-3, atol=1e-6 * float(found[0].abs().max()))


def test_a_contrast_takes_two_captions(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({**OF_IMAGES, "algorithm.contrast": 1.0})
    batch = trainer.batch()
    trainer.batch = lambda: replace(batch, captions=[Example("one")] * len(batch.captions))  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"algorithm\.contrast: found one text in the batch, 'one'"):
        collect(trainer)


# (d) no online adaptation


def test_without_surrogate_steps_it_learns_in_the_warm_up_alone(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({"algorithm.surrogate_steps": 0, "surrogate.warmup": 2, "train.updates": 2})
    assert trainer.ctx.surrogate is not None
    module, policy = trainer.ctx.surrogate.module(), copies(trainer.ctx.policy.parameters())
    seen = [copies(module.parameters())]
    while not trainer.finished:
        list(trainer.round())
        seen.append(copies(module.parameters()))
    assert [equal(a, b) for a, b in itertools.pairwise(seen)] == [False, False, True, True]
    assert not equal(policy, copies(trainer.ctx.policy.parameters())) and not trainer.ctx.warnings


def test_a_surrogate_that_never_learns_is_reported(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({"algorithm.surrogate_steps": 0, "surrogate.warmup": 0})
    list(trainer.round())
    at_start, warning = trainer.ctx.warnings
    assert "begins untrained" in at_start and "surrogate.init or surrogate.warmup" in warning


# models that were distilled otherwise


def test_the_pull_to_the_model_before_training_is_golden_and_leads_back(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({
        "regulariser": [{"name": "reference", "weight": 0.5}], "algorithm.step_weights": [0.0, 0.0],
        "surrogate.warmup": 0, "train.learning_rate": 1e-2, "train.updates": 15,
    })  # fmt: skip
    (rows,) = whole_updates(trainer)
    loss, _ = trainer.loss(rows)
    assert float(loss.detach()) == 0 and not gradient(trainer, loss).any()
    with torch.no_grad():
        for parameter in trainer.ctx.policy.parameters():
            parameter += 0.05
    (rows,) = whole_updates(trainer)
    loss, metrics = trainer.loss(rows)
    states, ctx = rows.own, trainer.ctx
    assert isinstance(states, States)
    with torch.no_grad():
        now = ctx.sampler.transition(ctx.policy, states.x, states.step, states.prompt).clean
        with ctx.policy.reference():
            before = ctx.sampler.transition(ctx.policy, states.x, states.step, states.prompt).clean
    assert float(metrics["reference_loss"].detach()) == pytest.approx(float((now - before).square().mean()), rel=1e-4)
    assert 0 < float(loss.detach()) == pytest.approx(float(metrics["reference_loss"].detach()) / 2)
    distances = []
    while not trainer.finished:
        distances += [update.metrics["reference_loss"] for update in trainer.round()]
    assert distances[-1] < 0.7 * distances[0]


def test_a_turbo_model_trains(tmp_path: Path, no_pages: None) -> None:
    run = alignkit.load(None, {
        "algorithm.name": "lasro", "model.name": "shapes_turbo", "regulariser": [{"name": "reference", "weight": 0.1}],
        "data.batch_size": 4, "train.updates": 3, "train.rows_per_update": 8, "evaluate.prompts": "",
        "reward": ["pixel_check"], "surrogate.warmup": 0, "algorithm.surrogate_steps": 4, "algorithm.samples": 4,
        "output": str(tmp_path / "run"), "train.device": "cpu",
    })  # fmt: skip
    run.check()
    assert run.config.sampler.name == "renoise" and isinstance(run.algorithm(), LaSRO)
    first, *_, last = (u.metrics for u in run.train())
    assert "distillation_loss" not in last and first["reference_loss"] == 0 < last["reference_loss"]
    assert last["surrogate_loss"] < first["surrogate_loss"] == pytest.approx(math.log(2), abs=1e-2)


def test_a_number_of_surrogate_updates_below_0_is_refused() -> None:
    with pytest.raises(ValueError, match="surrogate_steps: found -1, expected 0 or more"):
        LaSRO(surrogate_steps=-1)
