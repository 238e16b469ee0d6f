"""DRaFT: its loss and gradient computed again, the steps that the gradient flows through, and its low-variance form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from alignkit.cli.app import app
from alignkit.errors import ConfigError
from alignkit.interfaces import Sampler
from alignkit.records import Example, PolicyFacts, Scores
from alignkit.runs.run import Run
from alignkit.testing import check_algorithm
from alignkit.testing.losses import assert_one_pass_is_several
from alignkit.testing.world import Form
from alignkit.training.predictions import recorded
from alignkit.training.trainer import Trainer
from alignkit_draft.draft import DRaFT, Starts
from alignkit_samplers.ddim import DDIM
from alignkit_samplers.lcm import LCM
from alignkit_samplers.renoise import Renoise
from method_checks import assert_the_true_reward_rises, collect, gradient, number, updates, whole_updates

MakeRun = Callable[..., Run]
MakeTrainer = Callable[..., Trainer]
SETTINGS: dict[str, Any] = {"algorithm.name": "draft", "regulariser": [], "train.rows_per_update": 64}


@pytest.fixture
def make(make_trainer: MakeTrainer) -> MakeTrainer:
    """A trainer of DRaFT on the consistency model, or with `ddim=True` on its teacher."""
    return lambda overrides=None, ddim=False: make_trainer(SETTINGS | (overrides or {}), ddim)


def smooth_scores(trainer: Trainer) -> None:
    """Score the latents themselves, without the rounding to 8 bits."""

    def score(latents: Tensor, examples: Any, log: bool = False) -> Scores:
        return Scores(latents.pow(2).mean((1, 2, 3)), torch.ones(len(latents), dtype=torch.bool))

    trainer.ctx.differentiable_score = score  # type: ignore[method-assign]


def directional(trainer: Trainer, rows: Starts, size: float) -> tuple[float, float]:
    """Return the derivative of the loss along its own gradient, by autograd and by finite differences."""
    parameters, method = trainer.ctx.policy.parameters(), trainer.algorithm
    slopes = torch.autograd.grad(method.loss(rows, trainer.ctx)[0], parameters, materialize_grads=True)
    length = torch.cat([slope.flatten() for slope in slopes]).norm()
    found = []
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter.add_(sign * size * slope / length)
            found.append(number(method.loss(rows, trainer.ctx)[0]))
    return float(length), (found[0] - found[1]) / (2 * size)


def test_the_loss_is_minus_the_reward_of_the_decoded_image_and_its_gradient_flows_through_the_decoder(
    make: MakeTrainer,
) -> None:
    trainer = make()
    (rows,) = updates(trainer)
    policy, sampler = trainer.ctx.policy, trainer.ctx.sampler
    assert rows.step.tolist() == [1, 1] and not rows.x.requires_grad
    loss, metrics = trainer.algorithm.loss(rows, trainer.ctx)
    clean = policy.denoise(rows.x, sampler.grid(policy)[rows.step], rows.prompt)
    expected = -policy.decode(clean).mean((1, 2, 3)).mean()
    assert set(metrics) == {"reward_loss"}
    assert number(loss) == pytest.approx(number(expected), abs=3e-3)  # of 8-bit images
    found, wanted = gradient(trainer, loss), gradient(trainer, expected)
    assert float(wanted.norm()) > 0
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("ddim", [False, True])
@pytest.mark.parametrize("last_steps", [1, 2, 3])
def test_the_gradient_flows_through_the_last_steps_and_no_others(
    make: MakeTrainer, last_steps: int, ddim: bool
) -> None:
    trainer = make({"algorithm.last_steps": last_steps, "sampler.num_steps": 3}, ddim)
    smooth_scores(trainer)
    with recorded(trainer.ctx.policy) as seen:
        (rows,) = updates(trainer)
        assert not seen and not rows.x.requires_grad
        loss, _ = trainer.algorithm.loss(rows, trainer.ctx)
    times = trainer.ctx.sampler.grid(trainer.ctx.policy)
    assert [p.t.tolist() for p in seen] == [[int(t)] * 2 for t in times[-last_steps:]]
    slopes = torch.autograd.grad(loss, [p.clean for p in seen], retain_graph=True)
    assert all(bool(slope.any()) for slope in slopes)
    # The start is fixed in the rows, so moving the weights moves the last steps alone.
    found, expected = directional(trainer, rows, 1e-2)
    assert found == pytest.approx(expected, rel=0.03)


def test_more_steps_with_gradient_give_another_gradient_of_the_same_loss(make: MakeTrainer) -> None:
    found = []
    for last_steps in (1, 2):
        trainer = make({"algorithm.last_steps": last_steps})
        smooth_scores(trainer)
        trainer.ctx.generator.manual_seed(5)
        with torch.no_grad():  # an adapter that has not learned yet is the same at every step
            for i, parameter in enumerate(trainer.ctx.policy.parameters()):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(i))
        loss, _ = trainer.algorithm.loss(collect(trainer), trainer.ctx)
        found.append((number(loss), gradient(trainer, loss)))
    (one, first), (two, second) = found
    assert one == pytest.approx(two, rel=1e-4)
    assert float(torch.cosine_similarity(first, second, dim=0)) < 0.999


def test_the_low_variance_form_noises_each_clean_result_to_the_level_of_the_last_step(make: MakeTrainer) -> None:
    trainer = make({"algorithm.low_variance": 3, "sampler.num_steps": 3})
    ctx, n = trainer.ctx, 3
    policy, state = ctx.policy, ctx.generator.get_state()
    collected = collect(trainer)
    trainer.batches = 0
    prompt = policy.encode([example.text for example in trainer.batch().examples])
    ctx.generator.set_state(state)
    times = ctx.sampler.grid(policy)
    with torch.no_grad():
        x = ctx.noise(2)
        for k in range(3):
            clean, noise = policy.denoise(x, times[k].expand(2), prompt), ctx.noise(2)
            if k < 2:
                alpha, sigma = policy.schedule(times[k + 1])
                x = alpha * clean + sigma * noise
    alpha, sigma = policy.schedule(times[2])
    expected = alpha * clean.repeat_interleave(n, dim=0) + sigma * ctx.noise(2 * n)
    assert torch.allclose(collected.x, expected, rtol=1e-4, atol=1e-4) and collected.step.tolist() == [2] * 6
    assert collected.prompt.texts == [text for text in prompt.texts for _ in range(n)]
    # The average over all copies is the mean over rows.
    loss = number(trainer.algorithm.loss(collected, ctx)[0])
    with torch.no_grad():
        images = policy.decode(policy.denoise(collected.x, times[2].expand(6), collected.prompt))
    assert loss == pytest.approx(-float(images.mean()), abs=3e-3)


def test_every_step_trains_the_prediction_of_each_step_from_a_state_without_gradient(make: MakeTrainer) -> None:
    trainer = make({"algorithm.every_step": True, "algorithm.samples": 2, "sampler.num_steps": 3})
    collected, ctx = collect(trainer), trainer.ctx
    assert collected.step.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and not collected.x.requires_grad
    one, _, two, _ = collected.prompt.texts[:4]
    assert one != two and collected.prompt.texts == [one, one, two, two] * 3
    times = ctx.sampler.grid(ctx.policy)
    with torch.no_grad():
        clean = ctx.policy.denoise(collected.x, times[collected.step], collected.prompt)
        expected = ctx.policy.decode(clean).mean((1, 2, 3))
        # A state is the prediction of the step before, noised to its level.
        alpha, sigma = (level.view(-1, 1, 1, 1) for level in ctx.policy.schedule(times[collected.step[4:]]))
        noise = (collected.x[4:] - alpha * clean[:8]) / sigma
    assert noise.std().item() == pytest.approx(1, abs=0.05) and noise.mean().item() == pytest.approx(0, abs=0.05)
    ctx.take_metrics()
    loss, _ = trainer.algorithm.loss(collected, ctx)
    logged = ctx.take_metrics()
    assert number(loss) == pytest.approx(-float(expected.mean()), abs=3e-3)
    for k in range(3):
        assert logged[f"reward/step{k + 1}"] == pytest.approx(float(expected[collected.step == k].mean()), abs=3e-3)


def test_unit_gradients_give_each_row_a_gradient_of_length_one_in_its_own_direction(make: MakeTrainer) -> None:
    trainer = make({"algorithm.unit_gradients": True, "algorithm.every_step": True})
    (rows,) = updates(trainer)
    clean = trainer.algorithm.predict(rows, trainer.ctx).detach().requires_grad_()
    scores = trainer.ctx.differentiable_score(clean, rows.prompt.examples)
    (slope,) = torch.autograd.grad(scores.values.sum(), clean)
    lengths = slope.flatten(1).norm(dim=1)
    assert float(lengths.min()) > 0 and float(lengths.max()) > 1.01 * float(lengths.min())
    loss, metrics = trainer.algorithm.loss(rows, trainer.ctx)
    assert number(loss) == number(metrics["reward_loss"]) == pytest.approx(-number(scores.values.mean()), abs=1e-6)
    again = trainer.algorithm.predict(rows, trainer.ctx)
    wanted = -(again * slope / lengths[:, None, None, None]).flatten(1).sum(1).mean()
    assert torch.allclose(gradient(trainer, loss), gradient(trainer, wanted), rtol=1e-4, atol=1e-7)


def test_each_image_is_decoded_and_scored_once_and_a_round_is_one_update(make: MakeTrainer) -> None:
    trainer = make({"algorithm.every_step": True, "sampler.num_steps": 3})
    policy, decoded = trainer.ctx.policy, []
    plain = policy.decode
    policy.decode = lambda x: decoded.append(len(x)) or plain(x)  # type: ignore[method-assign, func-returns-value]
    (update,) = trainer.round()
    assert decoded == [6] and trainer.ctx.take_images() == 6
    assert update.reward == pytest.approx(-update.metrics["reward_loss"])


def test_a_round_with_more_rows_than_an_update_takes_is_several_updates(make: MakeTrainer) -> None:
    trainer = make({"algorithm.samples": 4, "train.rows_per_update": 3})
    found = updates(trainer)
    assert [len(rows) for rows in found] == [3, 3, 2]
    assert len({tuple(x.flatten().tolist()) for rows in found for x in rows.x}) == 8


@pytest.mark.parametrize("settings", [{"algorithm.last_steps": 2}, {"algorithm.low_variance": 2},
                                      {"algorithm.every_step": True}, {"algorithm.unit_gradients": True}])  # fmt: skip
def test_one_pass_of_all_rows_has_the_gradient_of_several_passes(make: MakeTrainer, settings: dict[str, Any]) -> None:
    trainer = make({**settings, "algorithm.samples": 2})
    (rows,) = updates(trainer)
    assert_one_pass_is_several(trainer, rows)


@pytest.mark.parametrize("unit", [False, True])
def test_an_image_that_cannot_be_scored_has_no_gradient(make: MakeTrainer, unit: bool) -> None:
    trainer = make({"algorithm.samples": 2, "algorithm.unit_gradients": unit})
    (rows,) = updates(trainer)
    ctx = trainer.ctx
    plain = ctx.differentiable_score

    def all_but_first(latents: Tensor, examples: Any, log: bool = False) -> Scores:
        scores, valid = plain(latents, examples, log), torch.arange(len(latents)) > 0
        return Scores(scores.values.masked_fill(~valid, torch.nan), valid)

    ctx.differentiable_score = all_but_first  # type: ignore[method-assign]
    with recorded(ctx.policy) as seen:
        loss, _ = trainer.algorithm.loss(rows, ctx)
    (slope,) = torch.autograd.grad(loss, seen[0].clean)
    assert bool(loss.isfinite()) and bool(slope.isfinite().all())
    assert slope.flatten(1).any(1).tolist() == [False, True, True, True]


def test_the_reward_gets_the_example_of_each_row(make: MakeTrainer) -> None:
    trainer = make({"algorithm.every_step": True})
    trainer._examples = [Example("a sign", {"number": i}) for i in range(len(trainer._examples))]
    ctx, seen = trainer.ctx, list[Example]()
    plain = ctx.differentiable_score

    def noting(latents: Tensor, examples: Any, log: bool = False) -> Scores:
        seen.extend(examples)
        return plain(latents, examples, log)

    ctx.differentiable_score = noting  # type: ignore[method-assign]
    collected = collect(trainer)
    trainer.algorithm.loss(collected, ctx)
    first, second = seen[:2]
    assert first != second and seen == [first, second] * 2


def test_the_regulariser_reference_sees_the_predictions_with_gradient(make: MakeTrainer) -> None:
    trainer = make({"regulariser": [{"name": "reference", "weight": 1.0}], "algorithm.last_steps": 2})
    (rows,) = whole_updates(trainer)
    loss, metrics = trainer.loss(rows)
    assert number(metrics["reference_loss"]) == pytest.approx(0, abs=1e-9) and bool(loss.requires_grad)


VARIANTS: list[tuple[DRaFT, Sampler, Form]] = [
    (DRaFT(last_steps=2), LCM(2), "lcm"),
    (DRaFT(low_variance=2), Renoise(2), "turbo"),
    (DRaFT(every_step=True, samples=2), Renoise(2), "turbo"),
    (DRaFT(every_step=True, unit_gradients=True), LCM(1), "lcm"),
    (DRaFT(last_steps=2), DDIM(3), "teacher"),
]


@pytest.mark.parametrize(("method", "sampler", "form"), VARIANTS)
def test_every_form_keeps_the_promises_of_an_algorithm(method: DRaFT, sampler: Sampler, form: Form) -> None:
    check_algorithm(method, sampler, form=form)


@pytest.mark.parametrize(
    "fields",
    [{"last_steps": 0}, {"low_variance": -1}, {"samples": 0}, {"last_steps": 2, "low_variance": 2},
     {"last_steps": 2, "every_step": True}, {"low_variance": 2, "every_step": True}],
)  # fmt: skip
def test_settings_that_exclude_each_other_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        DRaFT(**fields)


def test_what_a_sampler_is_too_short_for_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.last_steps: found 3, expected at most sampler\.num_steps"):
        DRaFT(last_steps=3).check(LCM(2), PolicyFacts())
    with pytest.raises(ConfigError, match=r"algorithm\.low_variance: found 2 with sampler\.num_steps = 1"):
        DRaFT(low_variance=2).check(LCM(1), PolicyFacts())
    DRaFT(last_steps=2).check(LCM(2), PolicyFacts())
    DRaFT(low_variance=2).check(LCM(2), PolicyFacts())


def test_a_black_box_is_refused_by_name_before_weights_load(tiny_run: MakeRun) -> None:
    run = tiny_run(overrides={**SETTINGS, "reward": ["jpeg_compressibility"]})
    with pytest.raises(ConfigError, match=r"^reward: algorithm draft follows the gradient of a reward, and jpeg.*\S$"):
        run.check()


def test_show_marks_what_is_not_in_the_paper() -> None:
    shown = CliRunner().invoke(app, ["show", "draft"])
    assert shown.exit_code == 0 and shown.output.count("Not in the paper") == 2


def test_the_reward_rises_on_a_toy_reward(make: MakeTrainer) -> None:
    assert_the_true_reward_rises(make({
        "algorithm.every_step": True, "data.batch_size": 4, "model.lora_rank": 8, "train.updates": 10,
        "train.learning_rate": 1e-2,
    }))  # fmt: skip
