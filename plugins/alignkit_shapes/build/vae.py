"""Stage 1: the AutoencoderKL, trained to reconstruct drawings."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from alignkit_shapes.scenes import Scene, draw, sample_scene

CONFIG = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    block_out_channels=(16, 32, 64, 64),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=1,
    norm_num_groups=8,
    sample_size=64,
)
KL_WEIGHT = 1e-5


def drawings_of(scenes: list[Scene]) -> torch.Tensor:
    """Draw the scenes as float (N, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.stack([draw(s) for s in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1


def drawings(count: int, rng: np.random.Generator) -> torch.Tensor:
    """Return `count` random drawings, float (count, 3, 64, 64) in [-1, 1]."""
    return drawings_of([sample_scene(rng) for _ in range(count)])


def crops(images: torch.Tensor, edge: int, rng: np.random.Generator) -> torch.Tensor:
    """Take one random crop of `edge` x `edge` pixels from each image, at multiples of the VAE's 8 pixels."""
    places = rng.integers(0, (images.shape[-1] - edge) // 8 + 1, (len(images), 2)) * 8
    return torch.stack([p[:, y : y + edge, x : x + edge] for p, (y, x) in zip(images, places, strict=True)])


def distance(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Return L1 plus squared error, with four times the weight at things and their outlines.

    Most pixels are plain ground; without the weights the decoder takes long to learn the outlines.
    """
    ground = pixels.flatten(2).median(-1).values[..., None, None]
    contrast = (pixels - ground).abs().amax(1, keepdim=True)
    weight = 1 + 3 * (F.max_pool2d(contrast, 3, stride=1, padding=1) > 0.1).float()
    difference = decoded - pixels
    return (weight * (difference.abs() + difference**2)).mean() / weight.mean()


def train(out: Path, steps: int = 4000, whole: int = 400, batch: int = 24, lr: float = 1e-3, seed: int = 0) -> None:
    """Train on crops of 32 pixels, and in the last `whole` steps on whole drawings; save in diffusers format to `out`.

    The scaling factor gives the latents unit variance.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vae = AutoencoderKL(**CONFIG)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    start = time.time()
    for step in range(steps):
        pixels = crops(drawings(batch, rng), 32 if step < steps - whole else 64, rng)
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        reconstruction = distance(decoded, pixels)
        loss = reconstruction + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(
                f"vae {step} loss {loss.item():.4f} rec {reconstruction.item():.4f} {time.time() - start:.0f} s",
                flush=True,
            )
        if step % 500 == 499 or step == steps - 1:
            with torch.no_grad():
                latents = vae.encode(drawings(256, np.random.default_rng(seed + 1))).latent_dist.sample()
            vae.register_to_config(scaling_factor=float(1 / latents.std()))
            vae.save_pretrained(out)


def refine(source: Path, out: Path, steps: int = 1000, batch: int = 16, lr: float = 1e-3, seed: int = 9) -> None:
    """Train only the decoder on whole drawings, from latents with as much noise as a sampler leaves: 0 to 0.3 std.

    The encoder is frozen, so networks trained on its latents stay valid. Without the noise a square decodes to a
    circle as soon as its latent is slightly off.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vae = AutoencoderKL.from_pretrained(source)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        pixels = drawings(batch, rng)
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.mode()
        noise = 0.3 * torch.rand(batch, 1, 1, 1) * torch.randn_like(latents) / vae.config.scaling_factor
        loss = distance(vae.decode(latents + noise).sample, pixels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"decoder {step} loss {loss.item():.4f}", flush=True)
        if step % 250 == 249 or step == steps - 1:
            vae.save_pretrained(out)
