"""The latent consistency distillation loss: closed forms, limits, and where the gradient goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    UNet2DConditionModel,
)
from torch import Tensor

from alignkit.distillation import Distillation, Noised, pseudo_huber
from alignkit.errors import ConfigError
from alignkit.models.diffusers_policy import DiffusersPolicy
from alignkit.records import PolicyFacts, Prompt
from alignkit.rollout import sample
from alignkit.runs.run import Run
from alignkit.testing.algorithm import assert_goes_on_from_its_checkpoint
from alignkit.training.trainer import Trainer
from alignkit_lcd.algorithm import LCD
from alignkit_regularisers.lcd import LatentConsistency
from alignkit_samplers.ddim import DDIM
from alignkit_samplers.lcm import LCM
from bare_policy import BarePolicy

SD = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod


class Analytic(BarePolicy):
    """The exact answer for data that is unit normal: the noise in x at t is sigma x."""

    def __init__(self) -> None:
        self.latent_shape, self.device, self.guidance_scale = (4, 8, 8), torch.device("cpu"), 1.0

    def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return SD[t].sqrt(), (1 - SD[t]).sqrt()

    def denoise(self, x: Tensor, t: Tensor, prompt: Prompt, guidance_scale: Tensor | None = None) -> Tensor:
        return self.schedule(t)[0].view(-1, 1, 1, 1) * x

    def encode(self, texts: Sequence[str]) -> Prompt:
        return Prompt(torch.zeros(1, 1, 1), torch.zeros(len(texts), dtype=torch.long))

    def encode_images(self, images: Tensor) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def parameters(self) -> list[torch.nn.Parameter]:
        return []

    def weights(self) -> dict[str, Tensor]:
        return {}

    def using(self, weights: Mapping[str, Tensor]) -> Any:
        return nullcontext()

    def reference(self) -> Any:
        return nullcontext()


def rows(prompt: Prompt, level: Sequence[int], guidance_scale: Sequence[float], seed: int = 0) -> Noised:
    generator = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, len(level), 4, 8, 8, generator=generator)
    return Noised(latents, prompt, noise, torch.tensor(level), torch.tensor(guidance_scale))


def test_one_step_of_the_analytic_teacher_is_a_rotation() -> None:
    """Levels are angles, cos of which is alpha; the step from one to the next multiplies by the cosine between them."""
    policy = Analytic()
    for t, t_next, golden in [(999, 979, 0.99996257), (499, 479, 0.99954444), (19, 0, 0.99454588)]:
        given = rows(policy.encode(["a"]), [(t + 1) // 20], [0.0])
        z, found, z_next, found_next = Distillation().solve(policy, given)
        assert (int(found), int(found_next)) == (t, t_next)
        assert torch.allclose(z_next, golden * z, rtol=1e-5, atol=1e-6)
    z, _, z_next, _ = Distillation(ode_steps=2).solve(policy, rows(policy.encode(["a"]), [2], [0.0]))
    assert torch.allclose(z_next, 0.88388945 * z, rtol=1e-5, atol=1e-6)


def test_without_a_difference_between_text_and_no_text_the_guidance_has_no_effect(tiny_teacher: Path) -> None:
    teacher = DiffusersPolicy(str(tiny_teacher), trainable=False, guidance_scale=1.0)
    targets = [
        Distillation().solve(teacher, rows(teacher.encode(["", ""]), [3, 40], [w, w]))[2] for w in (0.0, 5.0, 15.0)
    ]
    assert torch.allclose(targets[0], targets[1], atol=1e-4) and torch.allclose(targets[0], targets[2], atol=1e-4)
    guided = [Distillation().solve(teacher, rows(teacher.encode(["a red circle"]), [40], [w]))[2] for w in (0.0, 5.0)]
    assert not torch.allclose(guided[0], guided[1], atol=1e-4)


def test_without_guidance_the_solver_step_is_that_of_plain_ddim(tiny_teacher: Path) -> None:
    teacher = DiffusersPolicy(str(tiny_teacher), trainable=False, guidance_scale=1.0)
    given = rows(teacher.encode(["a red circle"]), [40], [1.0])
    z, t, z_next, _ = Distillation().solve(teacher, given)
    scheduler = DDIMScheduler.from_config(teacher.pipe.scheduler.config)
    scheduler.set_timesteps(50)
    with torch.no_grad():
        output = teacher.unet(z, t, given.prompt.features).sample
    expected = scheduler.step(output, int(t), z, eta=0.0).prev_sample
    assert torch.allclose(z_next, expected, rtol=1e-4, atol=1e-5)


def test_guidance_is_that_of_the_paper(tiny_teacher: Path) -> None:
    """RG-LCD, Eq. 9: z + (1 + w) Psi(z, c) - w Psi(z, ""), with Psi the plain step minus z."""
    teacher = DiffusersPolicy(str(tiny_teacher), trainable=False, guidance_scale=1.0)
    level = [3, 25, 50]
    z, _, guided, _ = Distillation().solve(teacher, rows(teacher.encode(["a red circle"] * 3), level, [4.0] * 3))
    _, _, with_text, _ = Distillation().solve(teacher, rows(teacher.encode(["a red circle"] * 3), level, [1.0] * 3))
    _, _, without, _ = Distillation().solve(teacher, rows(teacher.encode([""] * 3), level, [1.0] * 3))
    assert torch.allclose(guided, z + 4 * (with_text - z) - 3 * (without - z), rtol=1e-4, atol=1e-4)


def test_at_the_last_level_the_target_is_the_solver_result_whatever_the_student_says(
    tiny_lcm: Path, tiny_teacher: Path
) -> None:
    torch.manual_seed(0)
    student = DiffusersPolicy(str(tiny_lcm), lora_rank=4)
    teacher = DiffusersPolicy(str(tiny_teacher), trainable=False, guidance_scale=1.0)
    given = rows(student.encode(["a red circle"] * 2), [1, 1], [5.0, 7.0])
    z, t, z_next, t_next = Distillation().solve(teacher, given)
    assert t.tolist() == [19, 19] and t_next.tolist() == [0, 0]
    with torch.no_grad():
        assert torch.equal(student.denoise(z_next, t_next, given.prompt, given.guidance_scale), z_next)
        prediction = student.denoise(z, t, given.prompt, given.guidance_scale)
        found = Distillation().loss(student, teacher, given)
    assert torch.equal(found, pseudo_huber(prediction - z_next, 1e-3).flatten(1).mean(1))


def test_the_gradient_reaches_the_student_through_its_prediction_alone(tiny_lcm: Path, tiny_teacher: Path) -> None:
    torch.manual_seed(0)
    student = DiffusersPolicy(str(tiny_lcm), lora_rank=4)
    teacher = DiffusersPolicy(
        str(tiny_teacher), lora_rank=0, guidance_scale=1.0
    )  # trainable, so that a leak would show
    given = rows(student.encode(["a red circle"] * 2), [10, 40], [5.0, 7.0])
    Distillation().loss(student, teacher, given).mean().backward()
    found = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    assert len(found) == len(student.parameters())
    assert all(p.grad is None for p in teacher.parameters())

    for p in student.parameters():
        p.grad = None
    z, t, z_next, t_next = Distillation().solve(teacher, given)
    with torch.no_grad():
        target = student.denoise(z_next, t_next, given.prompt, given.guidance_scale)
    prediction = student.denoise(z, t, given.prompt, given.guidance_scale)
    pseudo_huber(prediction - target, 1e-3).mean().backward()
    assert all(torch.allclose(a, p.grad, atol=1e-7) for a, p in zip(found, student.parameters(), strict=True))
    moved = {name: p.detach() + 0.1 for name, p in student.weights().items()}
    with torch.no_grad():
        averaged = Distillation().loss(student, teacher, given, moved)
        with student.using(moved):
            other = student.denoise(z_next, t_next, given.prompt, given.guidance_scale)
    assert torch.allclose(averaged, pseudo_huber(prediction - other, 1e-3).flatten(1).mean(1))
    assert not torch.allclose(other, target)


def test_levels_guidance_and_noise_are_sampled_over_their_whole_range() -> None:
    generator = torch.Generator().manual_seed(0)
    ctx: Any = SimpleNamespace(
        generator=generator, noise=lambda count: torch.randn(count, 4, 2, 2, generator=generator)
    )
    prompt = Prompt(torch.zeros(1, 1, 1), torch.zeros(4000, dtype=torch.long))
    rows = Distillation(guidance_scale_min=3.0, guidance_scale_max=15.0).sample(torch.zeros(4000, 4, 2, 2), prompt, ctx)
    assert set(rows.level.tolist()) == set(range(1, 51))  # both ends included
    assert rows.level.float().mean().item() == pytest.approx(25.5, abs=1)
    assert 3 <= float(rows.guidance_scale.min()) < 3.1 and 14.9 < float(rows.guidance_scale.max()) <= 15
    assert float(rows.guidance_scale.mean()) == pytest.approx(9, abs=0.3)
    assert float(rows.noise.std()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("form", ["embedded", "lora"])
def test_a_student_that_does_not_take_the_guidance_predicts_without_and_is_taught_the_guided_step(
    tiny_lcm: Path, tiny_teacher: Path, form: str
) -> None:
    """As in diffusers' script for LCM-LoRA: guidance gets into its weights, and is no second pass of the student."""
    folder = tiny_lcm if form == "embedded" else tiny_teacher
    student = DiffusersPolicy(str(folder), prediction="consistency", lora_rank=4, guidance_scale=1.5)
    teacher = DiffusersPolicy(str(tiny_teacher), trainable=False, guidance_scale=1.0)
    given = rows(student.encode(["a red circle"] * 3), [2, 25, 50], [5.0, 9.0, 15.0])
    seen: list[int] = []
    student.unet.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    found = Distillation().loss(student, teacher, given)
    assert seen == [3, 3]
    z, t, z_next, t_next = Distillation().solve(teacher, given)
    unguided = rows(given.prompt, [2, 25, 50], [0.0] * 3)
    assert not torch.allclose(z_next, Distillation().solve(teacher, unguided)[2], atol=1e-3)
    w = given.guidance_scale if form == "embedded" else torch.ones(3)
    expected = student.denoise(z, t, given.prompt, w) - student.denoise(z_next, t_next, given.prompt, w)
    assert torch.allclose(found, pseudo_huber(expected, 1e-3).flatten(1).mean(1), rtol=1e-4)


def test_the_pseudo_huber_distance_is_golden() -> None:
    u = torch.tensor([0, 1e-3, 1e-2, 1], dtype=torch.float64, requires_grad=True)
    distance = pseudo_huber(u, 1e-3)
    assert distance.tolist() == pytest.approx([0, 4.14213562e-4, 9.04987562e-3, 0.9990005], rel=1e-6)
    (slope,) = torch.autograd.grad(distance.sum(), u)
    assert slope[0] == 0 and bool((slope.abs() <= 1).all())


def test_the_square_is_an_option_and_the_mean_over_elements_either_way() -> None:
    prediction, target = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(
        Distillation(distance="l2").distances(prediction, target),
        torch.stack([torch.nn.functional.mse_loss(a, b) for a, b in zip(prediction, target, strict=True)]),
    )
    expected = pseudo_huber(prediction - target, 0.1).mean((1, 2, 3))
    assert torch.allclose(Distillation(huber_c=0.1).distances(prediction, target), expected)


@pytest.mark.parametrize(
    "fields",
    [{"ode_steps": 0}, {"guidance_scale_min": 3.0, "guidance_scale_max": 1.0}],
)
def test_settings_that_make_no_solver_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="target_decay"):
        LCD(target_decay=1.0)
    for kind in (LCD, LatentConsistency):
        with pytest.raises(ValueError, match=r"ode_steps|guidance_scale_min"):
            kind(**fields)


@pytest.mark.parametrize("ode_steps", [30, 2000])
def test_solver_steps_that_do_not_divide_the_times_of_the_model_are_refused(ode_steps: int) -> None:
    with pytest.raises(ConfigError, match=rf"^ode_steps: found {ode_steps}, expected a divisor of 1000"):
        Distillation(ode_steps).times(Analytic())


def test_a_student_that_is_no_latent_consistency_model_is_refused() -> None:
    LCD().check(LCM(1), PolicyFacts())
    with pytest.raises(ConfigError, match=r"sampler\.name: found DDIM, expected lcm: .* SD-Turbo"):
        LCD().check(DDIM(), PolicyFacts())
    with pytest.raises(ConfigError, match=r"algorithm\.ode_steps: found 25, expected 50"):
        LCD(ode_steps=25).check(LCM(2), PolicyFacts())


def test_the_average_that_gives_the_target_follows_with_its_decay_and_is_resumed(
    make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    settings = {"algorithm.name": "lcd", "algorithm.target_decay": 0.75, "train.learning_rate": 1e-2}
    trainer = make_trainer(settings)
    first = {name: p.detach().clone() for name, p in trainer.ctx.policy.weights().items()}
    list(trainer.round())
    average = trainer.algorithm.state_dict()["target"]
    for name, now in trainer.ctx.policy.weights().items():
        assert torch.allclose(average[name], 0.75 * first[name] + 0.25 * now, atol=1e-6)
    assert not make_trainer({"algorithm.name": "lcd"}).algorithm.state_dict()["target"]
    assert_goes_on_from_its_checkpoint(make_trainer, settings, tmp_path)


def test_a_model_of_many_steps_becomes_one_that_takes_the_guidance_and_that_diffusers_loads(
    tiny_run: Callable[..., Run], tiny_teacher: Path
) -> None:
    run = tiny_run(overrides={
        "algorithm.name": "lcd", "model.name": str(tiny_teacher), "model.lora_rank": 0, "model.guidance_embedding": 32,
        "model.prediction": "consistency", "model.guidance_scale": 4.0, "train.updates": 2, "evaluate.prompts": "",
        "train.learning_rate": 1e-2, "algorithm.target_decay": 0.95,
    })  # fmt: skip
    assert [u.step for u in run.train()] == [1, 2]
    plain = DiffusersPolicy(str(tiny_teacher))
    pipe = LatentConsistencyModelPipeline(
        vae=plain.pipe.vae, text_encoder=plain.pipe.text_encoder, tokenizer=plain.pipe.tokenizer,
        unet=UNet2DConditionModel.from_pretrained(run.folder / "unet"),
        scheduler=LCMScheduler.from_config(plain.pipe.scheduler.config),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    assert bool(pipe.unet.time_embedding.cond_proj.weight.any())  # it was learned
    again = DiffusersPolicy(
        str(tiny_teacher), unet=str(run.folder / "unet"), prediction="consistency", guidance_scale=4.0
    )
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = pipe("a red circle", num_inference_steps=1, guidance_scale=4.0, latents=noise, output_type="latent").images
    ours = sample(again, LCM(1), again.encode(["a red circle"]), noise[:, None].repeat(1, 2, 1, 1, 1))
    assert torch.allclose(theirs, ours, atol=1e-4)


def test_the_input_for_the_guidance_changes_nothing_before_it_is_trained(tiny_teacher: Path, tiny_lcm: Path) -> None:
    plain = DiffusersPolicy(str(tiny_teacher), prediction="consistency", lora_rank=0)
    wide = DiffusersPolicy(str(tiny_teacher), prediction="consistency", lora_rank=0, guidance_embedding=32)
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([999, 19])
    prompt, w = plain.encode(["a red circle"] * 2), torch.tensor([1.0, 9.0])
    with torch.no_grad():
        assert torch.equal(wide.denoise(x, t, prompt, w), plain.denoise(x, t, prompt, torch.ones(2)))
    wide.denoise(x, t, prompt, w).sum().backward()
    assert bool(wide.unet.time_embedding.cond_proj.weight.grad.any())
    with pytest.raises(ConfigError, match=r"model\.guidance_embedding: found 32 for a network that takes the guidance"):
        DiffusersPolicy(str(tiny_lcm), lora_rank=0, guidance_embedding=32)


def test_the_plain_method_trains_without_scoring_an_image(tiny_run: Callable[..., Run]) -> None:
    run = tiny_run(overrides={"algorithm.name": "lcd", "train.updates": 2, "evaluate.prompts": ""})
    updates = list(run.train())
    assert [u.step for u in updates] == [1, 2]
    assert all(u.metrics["distillation_loss"] > 0 and u.metrics["grad_norm"] > 0 for u in updates)
    assert all(math.isnan(u.reward) for u in updates)
