"""Conversions between what a diffusion network predicts and the clean latent, as pure functions.

`x` is (N, ...); `alpha` and `sigma` are (N,) with x = alpha clean + sigma noise. All in float32: at the noisiest step
of Stable Diffusion alpha is .068, so an error of the prediction is amplified 15 times.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def columns(values: Tensor, like: Tensor) -> Tensor:
    """(N,) as (N, 1, 1, ...) with as many axes as `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


def to_clean(prediction: str, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The clean latent from a network's output; `prediction` is diffusers' prediction_type or "flow"."""
    a, s = columns(alpha, x), columns(sigma, x)
    if prediction == "epsilon":
        return (x - s * output) / a
    if prediction == "v_prediction":
        return a * x - s * output
    if prediction == "sample":
        return output
    if prediction == "flow":  # velocity noise - clean on the line x = (1 - t) clean + t noise
        return x - s * output
    raise ValueError(f"prediction type {prediction!r} is not known")


def to_noise(clean: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that belongs to `x` if `clean` is right."""
    return (x - columns(alpha, x) * clean) / columns(sigma, x)


def add_noise(clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """alpha clean + sigma noise."""
    return columns(alpha, clean) * clean + columns(sigma, clean) * noise


def ddim_std(alpha: Tensor, sigma: Tensor, alpha_next: Tensor, sigma_next: Tensor, eta: float) -> Tensor:
    """The standard deviation (N,) of a DDIM step; eta = 1 is the DDPM posterior (Song et al. 2021, Eq. 16).

    Written for any schedule: with alpha^2 + sigma^2 = 1 the second factor is the paper's 1 - alpha^2 / alpha_next^2.
    """
    variance = (sigma_next**2 / sigma**2) * (sigma**2 - (alpha / alpha_next) ** 2 * sigma_next**2)
    return eta * variance.clamp(min=0).sqrt()


def boundary_scalings(t: Tensor, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """c_skip and c_out (N,) of a latent consistency model at train timesteps t (Luo et al. 2023).

    Unlike EDM, c_out carries no factor sigma_data; released checkpoints were trained so.
    """
    u = timestep_scaling * t.double()
    c_skip = sigma_data**2 / (u**2 + sigma_data**2)
    c_out = u / (u**2 + sigma_data**2).sqrt()
    return c_skip.float(), c_out.float()


def guidance_embedding(w: Tensor, dim: int) -> Tensor:
    """The sinusoidal embedding (N, dim) of the guidance w (N,) that latent consistency UNets take."""
    half = dim // 2
    frequencies = torch.exp(-torch.arange(half, device=w.device, dtype=torch.float32) * math.log(10000.0) / (half - 1))
    angles = 1000.0 * w.float()[:, None] * frequencies[None, :]
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))
