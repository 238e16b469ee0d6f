"""Conversions and schedules against golden values, which were computed in float64 or by the official code."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from alignkit import diffusion

SD = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod


def at(*times: int) -> tuple[Tensor, Tensor]:
    level = SD[list(times)]
    return level.sqrt(), (1 - level).sqrt()


def test_the_noise_levels_are_those_of_stable_diffusion() -> None:
    golden = [0.99914998, 0.98224396, 0.67543209, 0.65897524, 0.27766943, 0.05662345, 0.00466010]
    assert SD[[0, 19, 249, 259, 499, 749, 999]].tolist() == pytest.approx(golden, abs=1e-7)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_every_kind_of_prediction_gives_back_the_clean_latent_and_the_noise(prediction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    alpha, sigma = at(19, 499, 749)
    if prediction == "flow":
        alpha = 1 - sigma
    a, s = diffusion.columns(alpha, clean), diffusion.columns(sigma, clean)
    output = {"epsilon": noise, "v_prediction": a * noise - s * clean, "sample": clean, "flow": noise - clean}
    x = diffusion.add_noise(clean, noise, alpha, sigma)
    assert torch.allclose(diffusion.to_clean(prediction, output[prediction], x, alpha, sigma), clean, atol=1e-5)
    assert torch.allclose(diffusion.to_noise(clean, x, alpha, sigma), noise, atol=1e-4)


def test_an_unknown_kind_of_prediction_is_refused() -> None:
    x = torch.ones(1, 4)
    with pytest.raises(ValueError, match="score"):
        diffusion.to_clean("score", x, x, *at(499))


@pytest.mark.parametrize(
    ("t", "t_next", "golden"),
    [
        (999, 979, 0.45999136),
        (999, 749, 0.93262543),
        (999, 499, 0.84470875),
        (749, 499, 0.78073336),
        (499, 0, 0.02915037),
        (249, 0, 0.02912931),
        (19, 0, 0.02846080),
        (999, 0, 0.02915508),
    ],
)
def test_the_standard_deviation_of_a_ddim_step_is_golden(t: int, t_next: int, golden: float) -> None:
    std = diffusion.ddim_std(*at(t), *at(t_next), eta=1.0)
    assert float(std) == pytest.approx(golden, rel=2e-5)
    assert float(diffusion.ddim_std(*at(t), *at(t_next), eta=0.5)) == pytest.approx(golden / 2, rel=2e-5)
    assert float(diffusion.ddim_std(*at(t), *at(t_next), eta=0.0)) == 0


def test_a_step_that_goes_nowhere_has_no_standard_deviation() -> None:
    assert float(diffusion.ddim_std(*at(0), *at(0), eta=1.0)) == 0


@pytest.mark.parametrize(("t", "c_skip", "c_out"), [(0, 1.0, 0.0), (19, 6.925160e-6, 0.9999965374), (999, 2.505e-9, 1)])
def test_the_boundary_scalings_are_golden(t: int, c_skip: float, c_out: float) -> None:
    found_skip, found_out = diffusion.boundary_scalings(torch.tensor([t]))
    assert float(found_skip) == pytest.approx(c_skip, rel=2e-4, abs=0)
    assert float(found_out) == pytest.approx(c_out, rel=1e-7, abs=0)


def test_the_embedding_of_the_guidance_is_golden() -> None:
    embedding = diffusion.guidance_embedding(torch.tensor([7.0, 0.0, 2.5]), 256)
    assert embedding.shape == (3, 256)
    golden = [0.50688541, 0.80428714, -0.86047971, 0.99994385]
    # Angles reach 7000, where neighbouring float32 numbers are 5e-4 apart; diffusers computes in float32 as well.
    assert embedding[0, :4].tolist() == pytest.approx(golden, abs=1e-3)
    assert embedding.square().sum(1).tolist() == pytest.approx([128.0] * 3, rel=1e-5)


def test_the_embedding_of_the_guidance_is_that_of_diffusers() -> None:
    from diffusers import LatentConsistencyModelPipeline

    w = torch.tensor([7.0, 0.3, 12.1])
    for dim in (256, 33):
        expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=dim)
        assert torch.allclose(diffusion.guidance_embedding(w, dim), expected, atol=2e-3)


def test_neighbouring_levels_compose() -> None:
    """In the DDPM chain alpha_t / alpha_s is the product over the steps between, so the variances of eta 1 are below
    those of the forward process and grow with the length of the step."""
    stds = [float(diffusion.ddim_std(*at(999), *at(t), eta=1.0)) for t in (989, 979, 959, 919)]
    assert all(shorter < longer for shorter, longer in pairwise(stds))
    assert all(std < math.sqrt(1 - float(SD[t])) for std, t in zip(stds, (989, 979, 959, 919), strict=True))
