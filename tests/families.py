"""Every family of models that is served, as a tiny pipeline of the same classes under the real scheduler's config.

Weights are random and images have 64 pixels; the classes, the ways through them and the scheduler configs are those
of the checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from alignkit.interfaces import Sampler
from alignkit.models.diffusers_policy import DiffusersPolicy
from alignkit.rollout import sample
from alignkit.testing.world import tiny_vae
from alignkit_shapes.build.text import tokenizer
from model_fixtures import tiny_text_config

TEXTS = ["a red circle", "a blue square and a green cross"]

COMMON = {
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
    "num_train_timesteps": 1000, "trained_betas": None,
}  # fmt: skip
TURBO = {
    "interpolation_type": "linear", "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "trailing",
}  # fmt: skip
SCHEDULERS: dict[str, dict[str, Any]] = {
    # huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5, scheduler/scheduler_config.json; the others likewise.
    "sd_1_5": COMMON | {
        "_class_name": "PNDMScheduler", "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    },
    # stabilityai/stable-diffusion-2-1
    "sd_2_1": COMMON | {
        "_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "set_alpha_to_one": False,
        "skip_prk_steps": True, "steps_offset": 1,
    },
    # stabilityai/sd-turbo
    "sd_turbo": COMMON | TURBO | {
        "_class_name": "EulerDiscreteScheduler", "sigma_max": None, "sigma_min": None, "timestep_type": "discrete",
        "use_karras_sigmas": False,
    },
    # stabilityai/sdxl-turbo
    "sdxl_turbo": COMMON | TURBO | {"_class_name": "EulerAncestralDiscreteScheduler"},
    # stabilityai/stable-diffusion-xl-base-1.0, and segmind/SSD-1B
    "sdxl": COMMON | TURBO | {
        "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "use_karras_sigmas": False,
    },
    # SimianLuo/LCM_Dreamshaper_v7
    "lcm_dreamshaper": COMMON | {
        "_class_name": "LCMScheduler", "clip_sample_range": 1.0, "dynamic_thresholding_ratio": 0.995,
        "original_inference_steps": 50, "prediction_type": "epsilon", "rescale_betas_zero_snr": False,
        "sample_max_value": 1.0, "set_alpha_to_one": True, "steps_offset": 0, "thresholding": False,
        "timestep_spacing": "leading",
    },
}  # fmt: skip

SMALL = {
    "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
}  # fmt: skip
UNETS: dict[str, dict[str, Any]] = {
    "sd_1_5": {"attention_head_dim": 2, "cross_attention_dim": 32},
    # SD 2 and SD-Turbo name the number of heads for each block and project linearly.
    "sd_2_1": {"attention_head_dim": (2, 4), "cross_attention_dim": 32, "use_linear_projection": True},
    "lcm_dreamshaper": {"attention_head_dim": 2, "cross_attention_dim": 32, "time_cond_proj_dim": 32},
    # Two text encoders side by side, the second one's pooled features and six numbers about the image.
    "sdxl": {
        "attention_head_dim": (2, 4), "cross_attention_dim": 64, "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
    },
}  # fmt: skip
UNETS["sd_turbo"], UNETS["sdxl_turbo"] = UNETS["sd_2_1"], UNETS["sdxl"]
UNETS["lcm_sdxl"] = UNETS["sdxl"] | {"time_cond_proj_dim": 32}
# SSD-1B is pruned: uneven depths of its transformers, and none in the middle.
UNETS["lcm_ssd_1b"] = UNETS["lcm_sdxl"] | {
    "mid_block_type": "UNetMidBlock2D",
    "reverse_transformer_layers_per_block": ((2, 1), (1, 1)),
}


def tiny_unet(name: str) -> UNet2DConditionModel:
    torch.manual_seed(1)
    return UNet2DConditionModel(**SMALL | UNETS[name])


def save_family(name: str, folder: Path) -> None:
    """The pipeline of that name, of random weights."""
    torch.manual_seed(0)
    config, words, scheduler = tiny_text_config(), tokenizer(), SCHEDULERS[name]
    parts: dict[str, Any] = {"text_encoder": CLIPTextModel(config), "tokenizer": words, "unet": tiny_unet(name)}
    parts["vae"] = tiny_vae(scaling_factor=0.13025 if "sdxl" in name else 0.18215)
    parts["scheduler"] = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
    if "sdxl" in name:
        parts |= {"text_encoder_2": CLIPTextModelWithProjection(config), "tokenizer_2": words}
        pipe = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        lcm = name.startswith("lcm")
        cls = diffusers.LatentConsistencyModelPipeline if lcm else diffusers.StableDiffusionPipeline
        pipe = cls(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))


def plain(folder: Path, **parts: Any) -> Any:
    """The pipeline as anybody would load it."""
    pipe = DiffusionPipeline.from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_parity(policy: DiffusersPolicy, sampler: Sampler, pipe: Any, guidance_scale: float, **call: Any) -> None:
    """Check that `pipe` and the policy sample the same latents, and decode them to the same images."""
    initial = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(3)
    noises = [initial, *(torch.randn(initial.shape, generator=generator) for _ in range(sampler.num_steps))]

    def sampled(output_type: str) -> torch.Tensor:
        images: torch.Tensor = pipe(
            TEXTS, num_inference_steps=sampler.num_steps, guidance_scale=guidance_scale, latents=initial.clone(),
            generator=torch.Generator().manual_seed(3), output_type=output_type, height=64, width=64, **call,
        ).images  # fmt: skip
        return images

    expected = sampled("latent")
    found = sample(policy, sampler, policy.encode(TEXTS), torch.stack(noises, dim=1))
    assert torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max()))
    assert not torch.allclose(found[0], found[1], atol=1e-2 * float(expected.abs().max()))
    with torch.no_grad():
        assert (policy.decode(found) - sampled("pt")).abs().max() < 5e-3


def lcm_lora(folder: Path, name: str = "sd_1_5") -> Path:
    """A LoRA in the form of the published ones: kohya's names, an alpha that is not the rank."""
    unet = tiny_unet(name)
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1"]))
    tensors = {}
    generator = torch.Generator().manual_seed(2)
    for name, value in unet.named_parameters():
        if ".lora_" in name:
            module, _, kind = name.removesuffix(".default.weight").rpartition(".lora_")
            key = "lora_unet_" + module.replace(".", "_")
            kind = {"A": "down", "B": "up"}[kind]
            tensors[f"{key}.lora_{kind}.weight"] = 0.3 * torch.randn(value.shape, generator=generator)
            tensors[f"{key}.alpha"] = torch.tensor(8.0)
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    return folder
