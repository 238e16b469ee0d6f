"""RG-LCD: its refusals, its loss compared with plain distillation, and the updates of policy and proxy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.distillation import Distillation, pseudo_huber
from alignkit.errors import ConfigError
from alignkit.records import Example, PolicyFacts, Scores
from alignkit.runs.run import Run
from alignkit.testing.losses import assert_one_pass_is_several
from alignkit.training.trainer import Trainer
from alignkit_rg_lcd.algorithm import RGLCD, Compared, Contrast
from alignkit_samplers.ddim import DDIM
from alignkit_samplers.lcm import LCM
from method_checks import collect, copies, equal, gradient, updates

MakeTrainer = Callable[..., Trainer]
MakeRun = Callable[..., Run]

DIRECT: dict[str, Any] = {"algorithm.name": "rg_lcd"}
PROXY: dict[str, Any] = {
    **DIRECT, "algorithm.proxy": True, "surrogate.patch": 2, "surrogate.width": 16, "surrogate.layers": 3,
    "surrogate.heads": 2, "algorithm.proxy_rows": 3,
}  # fmt: skip


# what it needs and refuses


def test_the_fields_decide_whether_a_gradient_of_the_reward_or_a_proxy_is_needed(tiny_run: MakeRun) -> None:
    assert RGLCD().needs == {"teacher", "images", "differentiable_reward"}
    assert RGLCD(proxy=True).needs == {"teacher", "images", "surrogate"}
    assert RGLCD(beta=0).needs == {"teacher", "images"}
    assert tiny_run(overrides=DIRECT).config.surrogate is None
    surrogate = tiny_run(overrides=PROXY).config.surrogate
    assert surrogate is not None and surrogate.name == "lrm"
    with pytest.raises(ConfigError, match="algorithm rg_lcd uses none"):
        tiny_run(overrides={**DIRECT, "surrogate.warmup": 3})


def test_a_black_box_reward_is_refused_for_the_direct_form_and_welcome_to_the_proxy(
    tiny_run: MakeRun, plugins: Any
) -> None:
    init = (
        "from alignkit import hookimpl\n@hookimpl\ndef register_rewards(register):\n"
        '    register("box", "box.r:Box", "Tells no gradient")'
    )
    source = "from alignkit.interfaces import Reward\nclass Box(Reward):\n    def __call__(self, images, examples): ..."
    plugins.install("box", init, r=source)
    with pytest.raises(ConfigError, match="rg_lcd follows the gradient of a reward, and box has none"):
        tiny_run(overrides={**DIRECT, "reward": ["brightness", "box"]}).check()
    tiny_run(overrides={**PROXY, "reward": ["brightness", "box"]}).check()
    tiny_run(overrides={**DIRECT, "algorithm.beta": 0.0, "reward": ["box"]}).check()


def test_a_student_that_is_no_latent_consistency_model_is_refused(tiny_run: MakeRun, tiny_lcm: Any) -> None:
    with pytest.raises(ConfigError, match=r"sampler\.name: found DDIM, expected lcm: .* SD-Turbo"):
        tiny_run(overrides={**DIRECT, "sampler.name": "ddim"}).check()
    with pytest.raises(ConfigError, match=r"model\.teacher: missing"):
        tiny_run(overrides={**DIRECT, "model.teacher": ""}).check()
    with pytest.raises(ConfigError, match=r"algorithm\.ode_steps: found 50, expected 100"):
        RGLCD().check(LCM(original_steps=100), PolicyFacts())
    for steps in (1, 2, 8):
        RGLCD().check(LCM(steps), PolicyFacts())
    with pytest.raises(ConfigError):
        RGLCD().check(DDIM(), PolicyFacts())


def test_a_surrogate_of_another_kind_is_refused(tiny_run: MakeRun) -> None:
    with pytest.raises(
        ConfigError, match=r"surrogate\.name: found latent_unet, expected lrm or another .* derived from LRM"
    ):
        tiny_run(overrides={**DIRECT, "algorithm.proxy": True, "surrogate.name": "latent_unet"}).check()


@pytest.mark.parametrize(
    "fields",
    [
        {"beta": -1.0},
        {"proxy_rows": 0},
        {"proxy": True, "pretraining": -1},
        {"expert_temperature": 0.0},
        {"target_decay": 1.0},
        {"ode_steps": 0},
    ],
)
def test_settings_that_cannot_learn_are_refused(fields: Mapping[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        RGLCD(**fields)


# the loss


@pytest.mark.parametrize("decay", [0.0, 0.95])
def test_without_the_reward_it_is_plain_distillation_bit_for_bit(make_trainer: MakeTrainer, decay: float) -> None:
    settings = {"algorithm.target_decay": decay, "train.learning_rate": 1e-2}
    mine = make_trainer({**DIRECT, **settings, "algorithm.beta": 0.0})
    plain = make_trainer({**settings, "algorithm.name": "lcd"})
    for _ in range(3):
        for trainer in (mine, plain):
            list(trainer.round())
        assert all(
            torch.equal(a, b) for a, b in zip(mine.ctx.policy.parameters(), plain.ctx.policy.parameters(), strict=True)
        )


def given(beta: float, cap: float | None = None) -> tuple[RGLCD, Tensor, Tensor, Any]:
    """A method whose prediction is a leaf, and a context whose reward is linear in it: <g, z>."""
    generator = torch.Generator().manual_seed(0)
    prediction, target, g = torch.randn(3, 5, 4, 8, 8, generator=generator)
    prediction.requires_grad_()
    method = RGLCD(beta=beta, reward_cap=cap)
    method._predict = lambda rows, ctx: (prediction, target)  # type: ignore[method-assign]

    def score(latents: Tensor, examples: Any, log: bool) -> Scores:
        valid = torch.tensor([True, True, True, True, False])
        return Scores((latents * g).flatten(1).sum(1).masked_fill(~valid, torch.nan), valid)

    ctx = SimpleNamespace(differentiable_score=score, log=lambda **metrics: None)
    rows = SimpleNamespace(prompt=SimpleNamespace(examples=[Example("a")] * 5))
    (expected,) = torch.autograd.grad(pseudo_huber(prediction - target, 1e-3).mean(), prediction)
    loss, _ = method.loss(rows, ctx)  # type: ignore[arg-type]
    (found,) = torch.autograd.grad(loss, prediction)
    return method, found - expected, g, loss


def test_a_linear_reward_adds_minus_beta_times_its_slope_over_the_rows() -> None:
    _, added, g, loss = given(beta=3.0)
    assert bool(loss.isfinite())
    assert torch.allclose(added[:4], -3 / 5 * g[:4], atol=1e-5)
    assert torch.equal(added[4], torch.zeros(4, 8, 8))  # what cannot be scored pulls nowhere


def test_a_reward_above_the_cap_pulls_no_more() -> None:
    _, free, _, _ = given(beta=1.0)
    _, capped, _, _ = given(beta=1.0, cap=0.0)
    still = capped.flatten(1).abs().sum(1) == 0
    assert 1 <= int(still[:4].sum()) < 4 and torch.allclose(capped[~still], free[~still])


def test_the_gradient_of_the_reward_comes_through_the_decoder(make_trainer: MakeTrainer) -> None:
    found = {}
    for beta in (0.0, 1.0, 2.0):
        trainer = make_trainer({**DIRECT, "algorithm.beta": beta})
        (rows,) = updates(trainer)
        found[beta] = gradient(trainer, trainer.algorithm.loss(rows, trainer.ctx)[0])
    zero, one, two = found.values()
    assert not torch.equal(zero, one) and torch.allclose(two - zero, 2 * (one - zero), rtol=1e-2, atol=1e-5)


def test_the_differentiable_score_is_the_score(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(DIRECT)
    ctx, examples = trainer.ctx, trainer.batch().examples
    latents = ctx.noise(2).requires_grad_()
    scores, plain = ctx.differentiable_score(latents, examples), ctx.score(latents, examples)
    assert torch.equal(scores.values, plain.values) and not plain.values.requires_grad
    (gradient,) = torch.autograd.grad(scores.values[0], latents)
    assert bool((gradient[0] != 0).any()) and not bool((gradient[1] != 0).any())
    assert ctx.take_images() == 4


def test_in_mixed_precision_images_are_decoded_in_the_precision_of_the_decoder(make_trainer: MakeTrainer) -> None:
    """SDXL's overflows in half precision: images would be black."""
    trainer = make_trainer({**DIRECT, "train.precision": "bf16"})
    ctx, examples = trainer.ctx, trainer.batch().examples
    latents = ctx.noise(2).requires_grad_()
    plain = ctx.differentiable_score(latents, examples)
    with trainer.accelerator.autocast():
        scores = ctx.differentiable_score(latents, examples)
    assert torch.equal(scores.values, plain.values)
    (found,), (expected,) = (torch.autograd.grad(s.values.sum(), latents) for s in (scores, plain))
    assert torch.equal(found, expected) and bool(found.any())


@pytest.mark.parametrize("settings", [DIRECT, PROXY])
def test_one_pass_of_all_rows_has_the_gradient_of_several_passes(
    make_trainer: MakeTrainer, settings: dict[str, Any]
) -> None:
    trainer = make_trainer({**settings, "train.rows_per_update": 5})
    (rows,) = updates(trainer)
    assert_one_pass_is_several(trainer, rows)


# the target


def test_the_target_follows_the_student_with_its_own_decay(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({**DIRECT, "algorithm.target_decay": 0.95, "train.learning_rate": 1e-2})
    method, weights = trainer.algorithm, trainer.ctx.policy.weights()
    assert isinstance(method, RGLCD)
    first = {name: p.detach().clone() for name, p in weights.items()}
    assert all(torch.equal(method._target.weights[name], first[name]) for name in first)
    list(trainer.round())
    for name, average in method._target.weights.items():
        assert torch.allclose(average, 0.95 * first[name] + 0.05 * weights[name], atol=1e-7)
    (rows,) = updates(trainer)
    prediction, target = method._predict(rows, trainer.ctx)
    assert prediction.requires_grad and not target.requires_grad
    # The target is the average's, and the student is in its place again afterwards.
    z, t, z_next, t_next = Distillation().solve(trainer.ctx.teacher, rows)  # type: ignore[arg-type]
    with torch.no_grad():
        own = trainer.ctx.policy.denoise(z_next, t_next, rows.prompt, rows.guidance_scale)
        with trainer.ctx.policy.using(method._target.weights):
            averaged = trainer.ctx.policy.denoise(z_next, t_next, rows.prompt, rows.guidance_scale)
        again = trainer.ctx.policy.denoise(z, t, rows.prompt, rows.guidance_scale)
    assert torch.equal(target, averaged) and not torch.equal(target, own) and torch.equal(prediction, again)


# the proxy


def test_the_expert_sees_each_image_under_its_own_caption(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({**PROXY, "train.rows_per_update": 6, "algorithm.proxy_rows": 5})
    batch, ctx = trainer.batch(), trainer.ctx
    assert batch.images is not None
    seen: list[tuple[Tensor, list[str]]] = []
    plain = ctx.score
    ctx.score = lambda x, e, log=True: seen.append((x, [one.text for one in e])) or plain(x, e, log)  # type: ignore[method-assign, misc, func-returns-value]
    rows = collect(trainer).lesson
    assert isinstance(rows, Compared) and rows.latents.shape == (5, 3, 4, 8, 8) and len(seen) == 3
    real = ctx.policy.encode_images(batch.images)
    where = [next(i for i in range(6) if torch.allclose(real[i], z, atol=1e-5)) for z in rows.latents[:, 0]]
    texts = [batch.captions[i].text for i in where]
    # The prediction first, for the reward that the run reports, then the real image and the target.
    for place, (latents, scored) in zip((1, 0, 2), seen, strict=True):
        assert texts == rows.prompt.texts == scored and torch.equal(latents, rows.latents[:, place])
    for place in range(3):
        expected = ctx.policy.decode(rows.latents[:, place]).mean((1, 2, 3))
        assert torch.allclose(rows.expert[:, place], expected, atol=3e-3)  # of 8-bit images


def test_the_proxy_and_the_policy_learn_each_in_its_own_update_and_frozen_layers_never(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer({**PROXY, "surrogate.learning_rate": 1e-2, "surrogate.warmup": 1})
    ctx, method = trainer.ctx, trainer.algorithm
    assert ctx.surrogate is not None
    module = ctx.surrogate.module()
    list(trainer.round())  # the pre-training touches the whole latent tower, so the optimizer knows all of it
    policy = copies(ctx.policy.parameters())
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    collected = collect(trainer)
    trainer._update_surrogate(collected)
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert equal(policy, copies(ctx.policy.parameters()))
    assert "log_scale" in changed and changed <= ctx.surrogate._finetuned  # type: ignore[attr-defined]
    assert {"latent.visual_projection.weight", "text.text_projection.weight"} < changed
    assert not any("embedding" in name or "latent.vision_model.encoder.layers.1" in name for name in changed)
    proxy = copies(module.parameters())
    for rows in method.updates(collected, ctx):
        trainer._update_policy(rows)
    assert equal(proxy, copies(module.parameters())) and not equal(policy, copies(ctx.policy.parameters()))


def test_the_loss_of_the_proxy_is_that_of_its_pairs_at_the_two_temperatures(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({**PROXY, "algorithm.expert_temperature": 0.02})
    ctx, rows = trainer.ctx, collect(trainer).lesson
    assert isinstance(rows, Compared) and ctx.surrogate is not None
    expected = torch.zeros(())
    for row in range(len(rows)):
        one = rows.select(torch.tensor([row]))
        scores = torch.cat([ctx.surrogate.score(one.latents[:, i], one.prompt) for i in range(3)])
        for i, j in ((0, 1), (0, 2), (1, 2)):
            p = (scores[[i, j]] / 0.07).log_softmax(0)
            q = (one.expert[0, [i, j]] / 0.02).softmax(0)
            expected = expected + (q * (q.log() - p)).sum() / len(rows)
    found = trainer.algorithm.surrogate_loss(rows, ctx)
    assert float(found) == pytest.approx(float(expected), rel=1e-3, abs=1e-5)
    order = torch.tensor([2, 0, 1])
    assert float(trainer.algorithm.surrogate_loss(rows.select(order), ctx)) == pytest.approx(float(found), rel=1e-5)


def test_the_warm_up_is_the_pre_training_and_one_batch_however_it_is_split(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({**PROXY, "surrogate.warmup": 2, "train.rows_per_pass": 1})
    policy = copies(trainer.ctx.policy.parameters())
    collected = collect(trainer)
    assert isinstance(collected.lesson, Contrast) and len(collected.lesson) == 1
    assert collected.lesson.latents.shape == (1, 4, 4, 8, 8)
    assert updates(trainer, collected) == []
    (update,) = trainer.round()
    assert update.step == 0 and "reward" not in update.metrics  # no image is scored
    assert 0 < update.metrics["surrogate_loss"] < 10 and equal(policy, copies(trainer.ctx.policy.parameters()))
    assert not trainer.warming_up and isinstance(collect(trainer).lesson, Compared)


def test_after_the_pre_training_the_proxy_may_learn_from_the_expert_while_the_policy_waits(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    settings = {**PROXY, "surrogate.warmup": 3, "algorithm.pretraining": 1}
    trainer = make_trainer(settings)
    policy, proxy = (copies(p) for p in (trainer.ctx.policy.parameters(), trainer.ctx.surrogate.module().parameters()))
    (first,) = trainer.round()
    assert "reward" not in first.metrics
    trainer.save(tmp_path, {})
    (second,) = trainer.round()
    assert "reward" in second.metrics and "pair_accuracy" in second.metrics and second.step == 0
    assert equal(policy, copies(trainer.ctx.policy.parameters()))
    assert not equal(proxy, copies(trainer.ctx.surrogate.module().parameters()))
    # One that goes on from the pre-training does not begin it again.
    resumed = make_trainer(settings)
    resumed.restore(tmp_path / "000000")
    (again,) = resumed.round()
    assert again.metrics["surrogate_loss"] == second.metrics["surrogate_loss"] and "reward" in again.metrics
    (third,) = trainer.round()
    assert third.step == 0 and not trainer.warming_up
    assert next(iter(trainer.round())).step == 1 and not equal(policy, copies(trainer.ctx.policy.parameters()))


def test_a_pre_training_beyond_the_warm_up_is_refused(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({**PROXY, "surrogate.warmup": 1, "algorithm.pretraining": 2})
    list(trainer.round())
    with pytest.raises(
        ConfigError, match=r"^algorithm\.pretraining: found 2, expected at most surrogate\.warmup, .* 1$"
    ):
        list(trainer.round())
    with pytest.raises(ValueError, match="pretraining: found without proxy"):
        RGLCD(pretraining=2)
