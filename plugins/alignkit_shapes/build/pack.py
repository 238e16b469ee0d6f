"""Stage 4: the parts as half-precision safetensors inside the package."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from transformers import BertTokenizer, BlipForQuestionAnswering


def pack(work: Path, weights: Path) -> None:
    """Write teacher, few-step model and judge to `weights`, in float16. The refined decoder takes the VAE's place: it
    was trained with the encoder frozen, so the latents are the same."""
    vae = AutoencoderKL.from_pretrained(work / "vae_refined")
    for name in ("teacher", "lcm"):
        pipe = DiffusionPipeline.from_pretrained(work / name, vae=vae)
        pipe.to(dtype=torch.float16).save_pretrained(weights / f"shapes_{name}")
    BlipForQuestionAnswering.from_pretrained(work / "judge").half().save_pretrained(weights / "judge")
    BertTokenizer.from_pretrained(work / "judge").save_pretrained(weights / "judge")
