"""Latents of a pipeline's VAE, scaled as its network takes them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from alignkit.models.modules import precision_of


class Latents:
    """The VAE of a pipeline: images to scaled latents and back, as diffusers' pipelines scale them.

    Pipelines of SDXL subtract the VAE's `latents_mean` and divide by its `latents_std`, if it has both; those of Stable
    Diffusion leave them alone.
    """

    def __init__(self, pipe: Any) -> None:
        self.vae = pipe.vae
        config = pipe.vae.config
        self._factor: float = config.scaling_factor
        mean, std = config.get("latents_mean"), config.get("latents_std")
        normalised = "text_encoder_2" in pipe.components and mean is not None and std is not None
        self._mean, self._std = (
            torch.tensor(values, device=pipe.vae.device, dtype=torch.float32).view(1, -1, 1, 1)
            for values in ((mean, std) if normalised else ([0.0], [1.0]))
        )

    def encode(self, images: Tensor) -> Tensor:
        """Return the latents (N, *S) float32 of images (N, 3, H, W) in [0, 1]: the mode, where they are random."""
        encoded = self.vae.encode((2 * images - 1).to(self._mean.device, precision_of(self.vae)))
        # TAESD returns the latents themselves.
        found = encoded.latents if isinstance(self.vae, AutoencoderTiny) else encoded.latent_dist.mode()
        latents: Tensor = (found.float() - self._mean) * self._factor / self._std
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images (N, 3, H, W) float32 in [0, 1] of scaled latents (N, *S); differentiable."""
        found = latents * self._std / self._factor + self._mean
        pixels: Tensor = self.vae.decode(found.to(precision_of(self.vae))).sample
        return (pixels.float() / 2 + 0.5).clamp(0, 1)
