"""The ablations of LaSRO's paper: each can be typed as the docs say, trains, and changes what it says."""

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
from alignkit.records import Example, Scores
from alignkit.runs.run import Run
from alignkit.testing import check_algorithm
from alignkit.training.trainer import Trainer
from alignkit_lasro.algorithm import LaSRO
from alignkit_samplers.renoise import Renoise
from method_checks import assert_the_true_reward_rises, collect, copies, equal, gradient, updates

MakeRun = Callable[..., Run]
MakeTrainer = Callable[..., Trainer]
PAGE = Path(__file__).parents[3] / "docs" / "algorithms" / "lasro.md"
ROW = re.compile(r"^\| \((\w)\) (.+?) \| `(--set .+?)` \|", re.MULTILINE)
TYPED = {f"{letter} {name}": options for letter, name, options in ROW.findall(PAGE.read_text(encoding="utf-8"))}
SMALL = {"surrogate.width": 32, "surrogate.layers": 2, "surrogate.heads": 2}
NO_DISTILLATION = {"algorithm.distillation_weight": 0.0}
OF_REWARD = {"algorithm.gradient_of": "reward", **NO_DISTILLATION}
OF_IMAGES = {"algorithm.states_from": "images", **NO_DISTILLATION}


def options(typed: str) -> dict[str, Any]:
    return dict(parse_assignment(word) for word in shlex.split(typed) if word != "--set")


def test_the_docs_tell_all_ablations_of_the_paper() -> None:
    assert sorted(name[0] for name in TYPED) == ["a", "a", "b", "c", "d", "e"]


@pytest.mark.parametrize("name", sorted(TYPED))
def test_what_the_docs_say_to_type_is_accepted_for_the_embedded_model(name: str, tmp_path: Path) -> None:
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
    """The brightness of one corner: an untrained decoder draws images whose means hardly differ."""

    differentiable = True

    def __call__(self, images: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor:
        return images[:, :, :8, :8].mean((1, 2, 3))


@pytest.mark.parametrize("fields", [{"gradient_of": "reward"}, {"states_from": "images"}, {"reference_weight": 0.5}])
@pytest.mark.parametrize("turbo", [False, True])
def test_an_ablation_keeps_the_promises_of_an_algorithm(fields: Mapping[str, Any], turbo: bool) -> None:
    if turbo:
        check_algorithm(LaSRO(distillation_weight=0.0, **fields), Renoise(2), form="teacher", reward=Corner())
    else:
        check_algorithm(LaSRO(samples=3, **fields), reward=Corner())


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
        "algorithm.pairs_per_update": 24, "data.batch_size": 5, **NO_DISTILLATION,
        **(SMALL if name != "latent_unet" else {}),
    })  # fmt: skip
    trainer.ctx.policy.decode = lambda latents: (latents[:, :3] / 20).sigmoid()  # type: ignore[method-assign]
    metrics = [update.metrics for _ in range(18) for update in trainer.round()]
    accuracy = [m["pair_accuracy"] for m in metrics[-5:]]
    assert sum(accuracy) / 5 > 0.8, accuracy


# (b) the alternative scheme


def test_states_are_captioned_images_noised_to_times_of_the_solver(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({**OF_IMAGES, "train.rows_per_update": 64})
    policy, collected = trainer.ctx.policy, collect(trainer)
    states = collected.states
    assert len(states) == 64 and states.time is not None and set(states.step.tolist()) == {0}
    assert bool(((states.time + 1) % 20 == 0).all()) and len(states.time.unique()) > 20
    alpha, sigma = (column.view(-1, 1, 1, 1) for column in policy.schedule(states.time))
    noise = (states.x - alpha * collected.images) / sigma
    assert float(noise.mean()) == pytest.approx(0, abs=0.02) and float(noise.std()) == pytest.approx(1, abs=0.02)
    with torch.no_grad():
        expected = policy.denoise(states.x, states.time, collected.captions)
    assert torch.allclose(states.clean, expected, rtol=1e-4, atol=1e-4)
    assert states.prompt.texts == collected.captions.texts
    # The surrogate learns from walks as ever.
    assert collected.scored.latents.shape[:2] == (4, 3) and len(trainer.algorithm._memory.rounds) == 1  # type: ignore[attr-defined]


def test_noised_images_weigh_as_much_as_all_steps_together(make_trainer: MakeTrainer) -> None:
    found = []
    for weights in ([1.0, 1.0], [0.5, 2.0]):
        trainer = make_trainer({**OF_IMAGES, "algorithm.step_weights": weights})
        head: Any = trainer.ctx.surrogate.module()  # type: ignore[union-attr]
        with torch.no_grad():
            head.head[-1].weight.normal_(generator=torch.Generator().manual_seed(0))
        (rows,) = updates(trainer)
        critic = trainer.algorithm._critic  # type: ignore[attr-defined]
        assert len(critic.mean) == 1
        loss, _ = trainer.algorithm.loss(rows, trainer.ctx)
        with torch.no_grad():
            clean = trainer.ctx.policy.denoise(rows.states.x, rows.states.time, rows.states.prompt)
            scores = trainer.ctx.surrogate.score(clean, rows.states.prompt)  # type: ignore[union-attr]
        level = ((scores - critic.mean[0]) / max(critic.level[0] - critic.mean[0], 0.05)).clamp(max=1)
        assert float(loss.detach()) == pytest.approx(-sum(weights) * float(level.mean()), rel=1e-3, abs=1e-4)
        found.append(gradient(trainer, loss))
    assert torch.allclose(found[1], found[0] * 2.5 / 2, rtol=1e-3, atol=1e-6 * float(found[0].abs().max()))


def test_a_contrast_takes_two_captions(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({**OF_IMAGES, "algorithm.contrast": 1.0})
    batch = trainer.batch()
    trainer.batch = lambda: replace(batch, captions=["one"] * len(batch.captions))  # type: ignore[method-assign]
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


def test_a_surrogate_that_was_never_taught_and_never_will_be_is_told(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({"algorithm.surrogate_steps": 0, "surrogate.warmup": 0})
    list(trainer.round())
    (warning,) = trainer.ctx.warnings
    assert "surrogate.init or surrogate.warmup" in warning


# (e) the gradient of the reward itself


def test_the_fields_decide_what_is_needed() -> None:
    assert LaSRO(gradient_of="reward", distillation_weight=0.0).needs == {"differentiable_reward"}
    assert LaSRO(gradient_of="reward").needs == {"differentiable_reward", "teacher", "images"}
    assert LaSRO(states_from="images", distillation_weight=0.0).needs == {"surrogate", "images"}
    assert LaSRO(purify=100, distillation_weight=0.0).needs == {"surrogate", "teacher"}
    assert LaSRO(gradient_of="reward", samples=1).samples == 1
    with pytest.raises(ValueError, match="samples is 1, expected at least 2"):
        LaSRO(samples=1)


def test_a_black_box_is_refused_in_one_line(tiny_run: MakeRun) -> None:
    run = tiny_run(overrides={**OF_REWARD, "reward": ["jpeg_compressibility"], "algorithm.samples": 2})
    with pytest.raises(ConfigError, match=r"^reward: algorithm lasro follows the gradient of a reward, and jpeg.*\S$"):
        run.check()


def test_the_policy_follows_the_reward_through_the_decoder(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(OF_REWARD)
    assert trainer.ctx.surrogate is None and trainer.surrogate_optimizer is None
    policy, (rows,) = trainer.ctx.policy, updates(trainer)
    critic = trainer.algorithm._critic  # type: ignore[attr-defined]
    states = rows.states
    before = policy.decode(states.clean).mean((1, 2, 3))
    for k in (0, 1):
        assert critic.mean[k] == pytest.approx(float(before[states.step == k].mean()), abs=0.02)
    loss, metrics = trainer.algorithm.loss(rows, trainer.ctx)
    clean = trainer.ctx.sampler.transition(policy, states.x, states.step, states.prompt).clean
    pixels = policy.decode(clean)
    values = pixels.mean((1, 2, 3))
    mean, level = (torch.tensor(column)[states.step] for column in (critic.mean, critic.level))
    expected = -2 * ((values - mean) / (level - mean)).clamp(max=1).mean()
    assert set(metrics) == {"reward_loss"}
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=0.2)  # of 8-bit images, and scaled
    found, wanted = gradient(trainer, loss), gradient(trainer, expected)
    assert float(torch.cosine_similarity(found, wanted, dim=0)) > 0.99 and float(found.norm()) > 0


def test_the_reward_rises_along_its_own_gradient(make_trainer: MakeTrainer) -> None:
    assert_the_true_reward_rises(make_trainer({
        **OF_REWARD, "algorithm.samples": 2, "data.batch_size": 4, "model.lora_rank": 8,
        "train.updates": 12, "train.rows_per_update": 16, "train.learning_rate": 1e-2,
    }))  # fmt: skip


def test_an_image_that_cannot_be_scored_pulls_nowhere_and_counts_for_no_scale(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(OF_REWARD)
    ctx: Any = trainer.ctx
    collected = collect(trainer)
    plain = ctx.differentiable_score

    def all_but_first(latents: torch.Tensor, examples: Any, log: bool = False) -> Scores:
        found = plain(latents, examples, log)
        valid = torch.arange(len(latents)) > 0
        return Scores(found.values.masked_fill(~valid, torch.nan), valid)

    ctx.score = ctx.differentiable_score = all_but_first
    (rows,) = updates(trainer, collected)
    assert all(m == m for m in trainer.algorithm._critic.mean)  # type: ignore[attr-defined]
    for unit in (False, True):
        clean = rows.states.clean.clone().requires_grad_(True)
        pull = trainer.algorithm._critic.pull(clean, rows, ctx, unit)  # type: ignore[attr-defined]
        (found,) = torch.autograd.grad(pull.sum(), clean)
        assert float(pull[0].detach()) == 0 and not found[0].any() and bool(found.isfinite().all())
        assert bool(found[1:].flatten(1).any(1).any())


def test_a_reward_is_asked_with_what_belongs_to_a_text(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({**OF_REWARD, "algorithm.contrast": 0.5})
    trainer._examples = [Example(f"text {i}", {"number": i}) for i in range(len(trainer._examples))]
    ctx: Any = trainer.ctx
    asked: list[Example] = []
    plain = ctx.differentiable_score
    ctx.differentiable_score = lambda x, examples, log=False: asked.extend(examples) or plain(x, examples, log)
    (rows,) = updates(trainer)
    trainer.algorithm.loss(rows, ctx)
    assert len(asked) == 2 * len(rows)
    assert [f"text {e.metadata['number']}" for e in asked] == rows.states.prompt.texts + rows.other.texts


def test_what_teaches_a_surrogate_is_not_scored_without_one(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({**OF_REWARD, "algorithm.negatives": 1})
    assert collect(trainer).scored.latents.shape[:2] == (4, 3)
    assert not trainer.algorithm.state_dict()["memory"]


# turbo


def test_the_pull_to_the_model_before_training_is_golden_and_leads_back(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({
        **NO_DISTILLATION, "algorithm.step_weights": [0.0, 0.0], "algorithm.reference_weight": 0.5,
        "surrogate.warmup": 0, "train.learning_rate": 1e-2, "train.updates": 15,
    })  # fmt: skip
    (rows,) = updates(trainer)
    loss, _ = trainer.algorithm.loss(rows, trainer.ctx)
    assert float(loss.detach()) == 0 and not gradient(trainer, loss).any()
    with torch.no_grad():
        for parameter in trainer.ctx.policy.parameters():
            parameter += 0.05
    (rows,) = updates(trainer)
    loss, metrics = trainer.algorithm.loss(rows, trainer.ctx)
    states, ctx = rows.states, trainer.ctx
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


def test_a_turbo_model_trains(tmp_path: Path) -> None:
    run = alignkit.load(None, {
        "algorithm.name": "lasro", "model.name": "shapes_turbo", "algorithm.reference_weight": 0.1,
        "data.batch_size": 4, "train.updates": 2, "train.rows_per_update": 8, "evaluate.prompts": "",
        "output": str(tmp_path / "run"), "train.device": "cpu",
    })  # fmt: skip
    run.check()
    assert run.config.sampler.name == "renoise" and isinstance(run.algorithm(), LaSRO)
    first, second = (u.metrics for u in run.train())
    assert "distillation_loss" not in second and first["reference_loss"] == 0 < second["reference_loss"]
    assert second["surrogate_loss"] < first["surrogate_loss"] == pytest.approx(math.log(2), abs=1e-2)


def test_settings_of_the_ablations_that_make_no_sense_are_refused() -> None:
    for name in ("surrogate_steps", "reference_weight"):
        with pytest.raises(ValueError, match=f"{name} is -1, expected 0 or more"):
            LaSRO(**{name: -1})
