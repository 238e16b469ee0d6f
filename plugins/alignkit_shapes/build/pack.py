"""Stage 4: store the parts as half-precision safetensors inside the package."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from transformers import BertTokenizer, BlipForQuestionAnswering


def pack(work: Path, weights: Path) -> None:
    """Write teacher, few-step model and VQA model to `weights`, in float16.

    The VAE with the refined decoder replaces the original one: its encoder was frozen, so the latents are the same.
    """
    vae = AutoencoderKL.from_pretrained(work / "vae_refined")
    for name in ("teacher", "lcm"):
        pipe = DiffusionPipeline.from_pretrained(work / name, vae=vae)
        pipe.to(dtype=torch.float16).save_pretrained(weights / f"shapes_{name}")
    BlipForQuestionAnswering.from_pretrained(work / "judge_refined").half().save_pretrained(weights / "judge")
    BertTokenizer.from_pretrained(work / "judge_refined").save_pretrained(weights / "judge")
    for config in weights.rglob("*.json"):
        if config.name in ("config.json", "model_index.json"):
            _tidy(config)


def _tidy(config: Path) -> None:
    """Remove the path of the build folder, and set the dtype to float32.

    transformers loads in the dtype of the config, diffusers in float32, and the parts of a pipeline must agree.
    """
    lines = config.read_text(encoding="utf-8").splitlines(keepends=True)
    text = "".join(line for line in lines if '"_name_or_path"' not in line)
    config.write_text(text.replace('"dtype": "float16"', '"dtype": "float32"'), encoding="utf-8")
