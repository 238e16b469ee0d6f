"""Tiny untrained pipelines for pictures of 64 pixels, saved in diffusers' format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig


def tiny_text_config() -> CLIPTextConfig:
    """A text encoder for the words of the embedded world."""
    from transformers import CLIPTextConfig

    from alignkit_shapes.build.text import tokenizer

    words = tokenizer()
    return CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=words.model_max_length, bos_token_id=words.bos_token_id, projection_dim=16,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip


def tiny_vae(**config: Any) -> AutoencoderKL:
    """Latents of 4 x 8 x 8."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=8, sample_size=64, **config,
    )  # fmt: skip


def _save(folder: Path, lcm: bool) -> Path:
    import diffusers
    import torch
    from transformers import CLIPTextModel

    from alignkit_shapes.build.text import tokenizer

    torch.manual_seed(0)
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    if lcm:
        pipeline, scheduler = diffusers.LatentConsistencyModelPipeline, diffusers.LCMScheduler(**schedule)
    else:
        pipeline = diffusers.StableDiffusionPipeline
        scheduler = diffusers.DDIMScheduler(**schedule, clip_sample=False, timestep_spacing="trailing", steps_offset=1)
    text_encoder = CLIPTextModel(tiny_text_config())
    vae = tiny_vae()
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2, time_cond_proj_dim=32 if lcm else None,
    )  # fmt: skip
    pipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer(), unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a StableDiffusionPipeline: predicts the noise, DDIM schedule."""
    return _save(tmp_path_factory.mktemp("teacher"), lcm=False)


@pytest.fixture(scope="session")
def tiny_lcm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LatentConsistencyModelPipeline whose UNet embeds the guidance."""
    return _save(tmp_path_factory.mktemp("lcm"), lcm=True)


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the tiny pipeline of a published model's form (families.py), made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        from families import save_family

        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            save_family(name, made[name])
        return made[name]

    return make
