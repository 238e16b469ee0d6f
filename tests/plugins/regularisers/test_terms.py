"""`lcd` and `reference`: their values, what they need, and that neither changes what others sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from alignkit.distillation import Distillation
from alignkit.errors import ConfigError
from alignkit.records import PolicyFacts
from alignkit.runs.run import Run
from alignkit.testing.algorithm import assert_goes_on_from_its_checkpoint
from alignkit.testing.losses import assert_one_pass_is_several
from alignkit.training.trainer import Trainer
from alignkit_regularisers.lcd import LatentConsistency
from alignkit_samplers.ddim import DDIM
from alignkit_samplers.lcm import LCM
from method_checks import assert_a_stopped_run_ends_with_the_same_bits, collect, number

MakeTrainer = Callable[..., Trainer]
BOTH = {
    "algorithm.name": "ddpo", "regulariser": [{"name": "lcd", "weight": 2.0}, {"name": "reference", "weight": 3.0}],
    "train.rows_per_update": 5, "data.batch_size": 3,
}  # fmt: skip


def first_rows(trainer: Trainer) -> Any:
    """The rows of the first update, with those of the regularisers."""
    batch = trainer.batch()
    trainer.regularisers.collect(batch, trainer.ctx)
    return next(trainer._updates(collect(trainer)))


def moved(trainer: Trainer, scale: float = 0.05) -> Trainer:
    """The trainer, with its policy away from where it began."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.ctx.policy.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return trainer


def test_the_distillation_term_is_the_loss_of_captioned_images_noised_anew(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(BOTH | {"regulariser.lcd.guidance_scale_min": 2.0, "regulariser.lcd.guidance_scale_max": 4})
    rows = first_rows(trainer)
    noised, teacher = rows.others[0], trainer.ctx.teacher
    assert len(noised) == len(rows.own) and rows.others[1] is None and teacher is not None
    assert float(noised.guidance_scale.min()) >= 2 and float(noised.guidance_scale.max()) <= 4
    total, metrics = trainer.regularisers.loss(rows, trainer.ctx, trainer.algorithm.loss)
    expected = Distillation(50, 2.0, 4.0).loss(trainer.ctx.policy, teacher, noised).mean()
    torch.testing.assert_close(metrics["distillation_loss"], expected)
    assert metrics["reference_loss"] == 0
    assert number(total) == pytest.approx(number(metrics["policy_loss"] + 2 * expected), rel=1e-5)


def test_more_rows_than_images_take_the_images_again(make_trainer: MakeTrainer) -> None:
    trainer, term = make_trainer(BOTH), LatentConsistency()
    batch = trainer.batch()
    assert batch.images is not None and len(batch.images) == 5
    rows = term.rows(term.collect(batch, trainer.ctx), 12, trainer.ctx)
    assert torch.equal(rows.latents[:5], rows.latents[5:10]) and torch.equal(rows.latents[:2], rows.latents[10:])
    assert rows.prompt.examples == [*batch.captions, *batch.captions, *batch.captions[:2]]
    assert not torch.equal(rows.noise[:5], rows.noise[5:10])


@pytest.mark.parametrize("ddim", [False, True])
def test_the_distance_to_the_model_before_training_is_that_of_the_algorithms_own_predictions(
    make_trainer: MakeTrainer, ddim: bool
) -> None:
    trainer = moved(
        make_trainer({"algorithm.name": "ddpo", "regulariser": ["reference"], "data.images": ""}, ddim=ddim)
    )
    assert trainer.ctx.teacher is None and trainer._images is None
    ctx, rows = trainer.ctx, first_rows(trainer)
    before = ctx.generator.get_state()
    total, metrics = trainer.regularisers.loss(rows, ctx, trainer.algorithm.loss)
    now = ctx.sampler.transition(ctx.policy, rows.own.x, rows.own.k, rows.own.prompt).clean
    with ctx.policy.reference():
        then = ctx.sampler.transition(ctx.policy, rows.own.x, rows.own.k, rows.own.prompt).clean
    torch.testing.assert_close(metrics["reference_loss"], (now - then).square().mean())
    assert number(total - metrics["policy_loss"]) == pytest.approx(number(metrics["reference_loss"]), rel=1e-4)
    assert number(metrics["reference_loss"]) > 1e-4 and torch.equal(before, ctx.generator.get_state())


def test_both_terms_are_means_over_rows(make_trainer: MakeTrainer) -> None:
    trainer = moved(make_trainer(BOTH))
    assert_one_pass_is_several(trainer, first_rows(trainer))


def test_the_reference_holds_back_what_the_policy_does(make_trainer: MakeTrainer) -> None:
    distances = []
    for weight in (1e-6, 1e3):
        trainer = make_trainer({
            "algorithm.name": "ddpo", "regulariser": [{"name": "reference", "weight": weight}],
            "train.learning_rate": 1e-2, "train.updates": 6,
        })  # fmt: skip
        found = [u.metrics["reference_loss"] for _ in range(6) if not trainer.finished for u in trainer.round()]
        assert found[0] == 0 < found[1]
        distances.append(found[-1])
    assert distances[1] < distances[0] / 2


def test_an_update_without_predictions_is_reported_and_held_to_nothing(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({"algorithm.name": "ddpo", "regulariser": ["reference"]})
    rows, loss = first_rows(trainer), torch.ones((), requires_grad=True)
    total, metrics = trainer.regularisers.loss(rows, trainer.ctx, lambda rows, ctx: (loss, {}))
    assert total == 1 and metrics == {}
    (warning,) = trainer.ctx.warnings
    assert warning.startswith("regulariser reference: the algorithm's loss made no prediction with gradient")


def test_the_reference_changes_nothing_that_is_sampled(make_trainer: MakeTrainer) -> None:
    found = []
    for regularisers in ([], ["reference"]):
        trainer = make_trainer({"algorithm.name": "ddpo", "regulariser": regularisers})
        (update, *_) = trainer.round()
        found.append({name: value for name, value in update.metrics.items() if name != "reference_loss"})
    assert found[0] == found[1]


def test_a_trainer_with_both_goes_on_from_its_checkpoint(make_trainer: MakeTrainer, tmp_path: Any) -> None:
    (metrics, *_) = assert_goes_on_from_its_checkpoint(make_trainer, BOTH, tmp_path)
    assert metrics["distillation_loss"] > 0 and metrics["reference_loss"] > 0


def test_a_stopped_run_with_both_ends_with_the_same_bits(tiny_run: Callable[..., Run]) -> None:
    one_update_a_round = {"train.rows_per_update": 12, "train.updates": 3, "evaluate.prompts": ""}
    assert_a_stopped_run_ends_with_the_same_bits(tiny_run, BOTH | one_update_a_round)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.teacher": ""},
            r"^model\.teacher: missing; regulariser lcd needs the model that .* was distilled from$",
        ),
        ({"data.images": ""}, r"^data\.images: missing; regulariser lcd needs captioned images$"),
        ({"regulariser.lcd.ode_steps": 25}, r"^regulariser\.lcd\.ode_steps: found 25, expected 50"),
        ({"sampler.name": "ddim", "sampler.eta": 1.0}, r"^sampler\.name: found DDIM, expected lcm: only a latent"),
    ],
)
def test_what_the_distillation_term_cannot_do_without_is_refused_before_weights_load(
    tiny_run: Callable[..., Run], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_run(overrides=BOTH | changes).check()
    without = {"regulariser.lcd.weight": 0} | ({"model.prediction": "epsilon"} if "sampler.name" in changes else {})
    run = tiny_run(overrides=BOTH | changes | without)
    assert run.check() == [] and [name for name, _, _ in run.regularisers()] == ["reference"]
    assert run.load_teacher() is None and run.images(64) is None


def test_a_weight_of_0_is_as_if_the_regulariser_were_not_there(tiny_run: Callable[..., Run]) -> None:
    settings = {"algorithm.name": "ddpo", "train.updates": 1, "evaluate.prompts": ""}
    found = []
    for name, extra in (("none", {"regulariser": []}), ("zero", {"regulariser": [{"name": "lcd", "weight": 0}]})):
        run = tiny_run(name, settings | extra)
        found.append([dict(update.metrics) for update in run.train()])
    assert found[0] == found[1] and "distillation_loss" not in found[0][0]


def test_the_settings_of_the_distillation_term_have_bounds() -> None:
    with pytest.raises(ValueError, match="ode_steps: found 0, expected "):
        LatentConsistency(ode_steps=0)
    with pytest.raises(ValueError, match=r"guidance_scale_min: found 9.0, expected at most guidance_scale_max"):
        LatentConsistency(guidance_scale_min=9.0, guidance_scale_max=3.0)


def test_a_consistency_sampler_without_a_grid_of_its_own_is_accepted() -> None:
    class Bare(DDIM):
        consistency = True

    LatentConsistency(ode_steps=25).check(Bare(2), PolicyFacts())
    LatentConsistency().check(LCM(2), PolicyFacts())
