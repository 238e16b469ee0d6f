"""The errors of noised pairs: equal to what diffusers' own parts give, in every space and for every prediction type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

from alignkit.diffusion import boundary_scalings, columns
from alignkit.models.diffusers_policy import DiffusersPolicy
from alignkit.records import PreferencePairs
from alignkit.training.trainer import Trainer
from alignkit_preference.noised import LatentPairs, NoisedPairs, encode_pairs, errors, margin, noised, rescaled

MakeTrainer = Callable[..., Trainer]
TEXTS = ["a red circle", "a black heart", "a white ring"]
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def rows(policy: DiffusersPolicy, times: list[int]) -> NoisedPairs:
    generator = torch.Generator().manual_seed(4)
    winner, loser, noise = torch.randn(3, len(times), *policy.latent_shape, generator=generator)
    return NoisedPairs(LatentPairs(winner, loser, policy.encode(TEXTS[: len(times)])), noise, torch.tensor(times))


@torch.no_grad()
def output(policy: DiffusersPolicy, x: torch.Tensor, t: torch.Tensor, texts: list[str], w: Any = None) -> torch.Tensor:
    """What the network itself gives, with text and without guidance."""
    found: torch.Tensor = policy.unet(x, t, policy.encode(texts).features, timestep_cond=w, return_dict=False)[0]
    return found


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_errors_equal_those_of_the_plain_network_under_diffusers_scheduler(
    tiny_teacher: Path, prediction: str, guidance_scale: float
) -> None:
    policy = DiffusersPolicy(str(tiny_teacher), prediction=prediction, trainable=False, guidance_scale=guidance_scale)
    scheduler = DDPMScheduler(**SCHEDULE, prediction_type=prediction)
    given = rows(policy, [999, 499, 20])
    targets = {"epsilon": ("noise", given.noise), "v_prediction": ("velocity", None), "sample": ("clean", None)}
    space, target = targets[prediction]
    for member, clean in enumerate((given.pairs.winner, given.pairs.loser)):
        x = scheduler.add_noise(clean, given.noise, given.t)
        goal = target if target is not None else clean
        goal = scheduler.get_velocity(clean, given.noise, given.t) if space == "velocity" else goal
        expected = (output(policy, x, given.t, TEXTS) - goal).pow(2).mean([1, 2, 3])
        with torch.no_grad():
            found = errors(given, policy, space)[:, member]  # type: ignore[arg-type]
        assert torch.allclose(found, expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_error_of_the_noise_is_that_of_the_clean_latent_in_units_of_the_noise_level(
    tiny_teacher: Path, prediction: str
) -> None:
    policy = DiffusersPolicy(str(tiny_teacher), prediction=prediction, trainable=False, guidance_scale=1.0)
    given = rows(policy, [999, 499, 20])
    alpha, sigma = policy.schedule(given.t)
    with torch.no_grad():
        noise, velocity, clean = (errors(given, policy, space) for space in ("noise", "velocity", "clean"))  # type: ignore[arg-type]
    assert torch.allclose(noise, clean * (alpha / sigma)[:, None] ** 2, rtol=1e-4)
    assert torch.allclose(velocity, clean / sigma[:, None] ** 2, rtol=1e-4)


def test_a_consistency_model_is_read_through_its_boundary_and_its_guidance(tiny_lcm: Path) -> None:
    policy = DiffusersPolicy(str(tiny_lcm), trainable=False, guidance_scale=8.0)
    given = rows(policy, [999, 499, 19])
    x = DDPMScheduler(**SCHEDULE).add_noise(given.pairs.loser, given.noise, given.t)
    half = torch.exp(-torch.arange(16) * torch.log(torch.tensor(10000.0)) / 15) * 7000.0
    w = torch.cat([half.sin(), half.cos()]).expand(3, 32)
    alpha, sigma = (columns(level, x) for level in policy.schedule(given.t))
    clean = (x - sigma * output(policy, x, given.t, TEXTS, w)) / alpha
    c_skip, c_out = (columns(scaling, x) for scaling in boundary_scalings(given.t))
    implied = (x - alpha * (c_skip * x + c_out * clean)) / sigma
    with torch.no_grad():
        found = errors(given, policy)[:, 1]
    assert torch.allclose(found, (implied - given.noise).pow(2).mean([1, 2, 3]), rtol=1e-3)


def test_the_rescaled_schedule_is_diffusers_and_ends_in_pure_noise_that_is_learned_from(tiny_teacher: Path) -> None:
    policy = DiffusersPolicy(str(tiny_teacher), trainable=False, guidance_scale=1.0)
    betas = rescale_zero_terminal_snr(DDPMScheduler(**SCHEDULE).betas.double())
    alpha, sigma = rescaled(policy, torch.arange(1000))
    assert torch.allclose(alpha.double() ** 2, (1 - betas).cumprod(0), atol=1e-5)
    assert alpha[-1] == 0 and sigma[-1] == 1
    given = rows(policy, [999, 499, 249])
    with torch.no_grad():
        found = errors(given, policy, zero_terminal_snr=True)
    assert found[0, 0].item() == pytest.approx(found[0, 1].item(), rel=1e-5)  # both members are the same pure noise
    for member, clean in enumerate((given.pairs.winner, given.pairs.loser)):
        a, s = (columns(level[given.t], clean) for level in (alpha, sigma))
        expected = (output(policy, a * clean + s * given.noise, given.t, TEXTS) - given.noise).pow(2).mean([1, 2, 3])
        assert torch.allclose(found[:, member], expected, rtol=1e-3)


def test_margin_is_blind_to_what_both_members_share_and_turns_with_them() -> None:
    now, before = torch.rand(2, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(margin(now.flip(1), before.flip(1)), -margin(now, before))
    shift = torch.tensor([0.3, 0.0], dtype=torch.float64)
    assert torch.allclose(margin(now + shift, before + shift), margin(now, before))
    assert not margin(now, now).any()


def test_each_pair_has_one_time_of_those_given_and_one_noise(make: MakeTrainer) -> None:
    trainer = make("diffusion_dpo")
    latents = encode_pairs(trainer.batch().pairs, trainer.ctx)
    once = noised(latents, torch.tensor([7, 11]), trainer.ctx)
    assert set(once.t.tolist()) == {7, 11} and once.noise.shape == latents.winner.shape
    assert len({tuple(x.flatten().tolist()) for x in once.noise}) == 8
    same = replace(once, pairs=replace(latents, loser=latents.winner))
    with torch.no_grad():
        found = errors(same, trainer.ctx.policy)
    assert torch.allclose(found[:, 0], found[:, 1], rtol=1e-3)


def test_each_image_is_mirrored_at_random_and_texts_are_left_out_as_often_as_configured(make: MakeTrainer) -> None:
    ctx = make("diffusion_dpo").ctx
    ctx.policy.encode_images = lambda images: images  # type: ignore[method-assign]
    ramp = torch.linspace(0, 1, 4).expand(200, 3, 4, 4)
    pairs = [PreferencePairs(ramp[:80], ramp[:80], ["a red circle"] * 80)]
    pairs.append(PreferencePairs(ramp[80:], ramp[80:], ["a red circle"] * 120))
    found = encode_pairs(pairs, ctx, flip=True, empty_prompts=0.2)
    mirrored = [x[:, 0, 0, 0] == 1 for x in (found.winner, found.loser)]
    assert all(70 < int(m.sum()) < 130 for m in mirrored) and 70 < int((mirrored[0] != mirrored[1]).sum()) < 130
    assert torch.equal(found.winner[mirrored[0]], ramp.flip(3)[mirrored[0]])
    assert torch.equal(found.winner[~mirrored[0]], ramp[~mirrored[0]])
    assert 20 < found.prompt.texts.count("") < 65
    plain = encode_pairs(pairs, ctx)
    assert torch.equal(plain.winner, ramp) and plain.prompt.texts.count("") == 0
