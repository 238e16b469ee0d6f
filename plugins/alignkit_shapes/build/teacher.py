"""Stage 2: the teacher, a StableDiffusionPipeline whose UNet and text encoder are trained together."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from alignkit import diffusion
from alignkit_shapes.build.text import WIDTH, text_encoder, tokenizer
from alignkit_shapes.build.vae import drawings_of
from alignkit_shapes.scenes import Scene, caption, sample_scene

SCHEDULE = dict(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000,
    prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    timestep_spacing="trailing",
)  # fmt: skip
"""The noise levels of Stable Diffusion. v-prediction keeps the clean latent accurate even at pure noise."""


def unet(time_cond_proj_dim: int | None = None) -> UNet2DConditionModel:
    """Return a UNet like Stable Diffusion's for 8x8 latents."""
    # As in Stable Diffusion's configs, `attention_head_dim` is the number of heads.
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(48, 96), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=2, norm_num_groups=16, time_cond_proj_dim=time_cond_proj_dim,
    )  # fmt: skip


class Pool:
    """A pool of encoded scenes; each batch replaces some of them and samples new captions."""

    def __init__(self, vae: AutoencoderKL, size: int, seed: int) -> None:
        self.vae, self.rng = vae, np.random.default_rng(seed)
        self.scenes: list[Scene] = []
        self.latents = torch.zeros(size, 4, 8, 8)
        for start in range(0, size, 64):
            self._fill(range(start, min(start + 64, size)))

    @torch.no_grad()
    def _fill(self, places: range | list[int]) -> None:
        scenes = [sample_scene(self.rng) for _ in places]
        latents = self.vae.encode(drawings_of(scenes)).latent_dist.mode() * self.vae.config.scaling_factor
        for place, scene, latent in zip(places, scenes, latents, strict=True):
            self.scenes[place : place + 1] = [scene]
            self.latents[place] = latent

    def batch(self, size: int, fresh: int) -> tuple[Tensor, list[str]]:
        """Replace `fresh` random scenes, then return `size` random latents (size, 4, 8, 8) with captions."""
        if fresh:
            self._fill(self.rng.integers(0, len(self.scenes), fresh).tolist())
        index = self.rng.integers(0, len(self.scenes), size)
        return self.latents[index], [caption(self.scenes[i], self.rng) for i in index]


def average_gradients(accelerator: Accelerator, parameters: list[torch.nn.Parameter]) -> None:
    """Average the gradients over all processes, in one collective call."""
    if accelerator.num_processes > 1:
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        flat = accelerator.reduce(flat, "mean")
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.copy_(flat[: parameter.numel()].view_as(parameter))
                flat = flat[parameter.numel() :]


def train(
    vae_folder: Path,
    out: Path,
    steps: int = 9000,
    batch: int = 64,
    lr: float = 1e-3,
    seed: int = 2,
    source: Path | None = None,
) -> None:
    """Train with `batch` scenes per step over all processes; save the averaged weights as a pipeline every 500 steps.

    `source` is the folder of a pipeline to continue from.
    """
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_pretrained(vae_folder).eval().requires_grad_(False)
    if source is None:
        words = tokenizer()
        text, network = text_encoder(words), unet()
    else:
        words = CLIPTokenizer.from_pretrained(source / "tokenizer")
        text = CLIPTextModel.from_pretrained(source / "text_encoder")
        network = UNet2DConditionModel.from_pretrained(source / "unet")
    parameters = [*network.parameters(), *text.parameters()]
    averages = [p.detach().clone() for p in parameters]
    noiser = DDIMScheduler(**SCHEDULE)
    alphas = noiser.alphas_cumprod
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.04)
    seed += 1000 * accelerator.process_index
    pool, generator = Pool(vae, 8000, seed), torch.Generator().manual_seed(seed)
    each = batch // accelerator.num_processes
    start, smooth = time.time(), 0.0
    for step in range(steps):
        latents, captions = pool.batch(each, fresh=3)
        dropped = torch.rand(each, generator=generator) < 0.1
        texts = ["" if drop else text for text, drop in zip(captions, dropped, strict=True)]
        ids = words(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        t = torch.randint(0, 1000, (each,), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        alpha, sigma = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
        x = diffusion.add_noise(latents, noise, alpha, sigma)
        velocity = diffusion.add_noise(noise, -latents, alpha, sigma)
        loss = F.mse_loss(network(x, t, text(ids)[0]).sample, velocity)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(accelerator, parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.998, (step + 1) / (step + 20))
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - decay)
        smooth = loss.item() if step == 0 else 0.98 * smooth + 0.02 * loss.item()
        if accelerator.is_main_process and (step % 100 == 0 or step == steps - 1):
            print(f"teacher {step} loss {smooth:.4f} {time.time() - start:.0f} s", flush=True)
        if accelerator.is_main_process and (step % 500 == 499 or step == steps - 1):
            kept = [p.detach().clone() for p in parameters]
            for parameter, average in zip(parameters, averages, strict=True):
                parameter.data.copy_(average)
            StableDiffusionPipeline(
                vae=vae, text_encoder=text, tokenizer=words, unet=network, scheduler=noiser,
                safety_checker=None, feature_extractor=None, requires_safety_checker=False,
            ).save_pretrained(out)  # fmt: skip
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.data.copy_(value)
