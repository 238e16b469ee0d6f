"""Model folders and files as people have them: copies of a tiny pipeline, each with one change."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

UNET = "unet/diffusion_pytorch_model.safetensors"


def edit(file: Path, **values: Any) -> None:
    """Change entries of a JSON file; None removes one."""
    found = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], to: Path | None = None) -> Path:
    """Write the tensors of a file otherwise, in its place unless `to` is given."""
    tensors = change(load_file(file))
    file.unlink()
    (to or file).unlink(missing_ok=True)
    if (to or file).suffix == ".bin":
        torch.save(tensors, to or file)
    else:
        save_file(tensors, to or file, {"format": "pt"})
    return to or file


def copied(source: Path, folder: Path) -> Path:
    """Copy a pipeline into a folder, and return where it may be changed."""
    return Path(shutil.copytree(source, folder / "model"))


def weights_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


def shard(folder: Path) -> None:
    """Split the UNet's file in two, with the index that diffusers reads."""
    file = folder / UNET
    tensors = load_file(file)
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    parts = [dict(list(tensors.items())[i::2]) for i in (0, 1)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, file.with_name(name), {"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: n for n, p in zip(names, parts, strict=True) for key in p}}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    file.unlink()


_VAE = {
    r"mid_block\.resnets\.0": "mid.block_1", r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0": "mid.attn_1", r"down_blocks\.(\d)\.resnets": r"down.\1.block",
    r"down_blocks\.(\d)\.downsamplers\.0": r"down.\1.downsample", r"up_blocks\.(\d)\.resnets": r"up.\1.block",
    r"up_blocks\.(\d)\.upsamplers\.0": r"up.\1.upsample", "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut",
    "group_norm": "norm", r"to_out\.0": "proj_out", r"to_([qkv])": r"\1",
}  # fmt: skip


def as_one_file(folder: Path, file: Path) -> Path:
    """Write a pipeline of Stable Diffusion, with one resnet a block, as one file in the original names."""
    from alignkit.models.layer_names import original_name

    tensors: dict[str, Tensor] = {}
    blocks = json.loads((folder / "unet/config.json").read_text())["up_block_types"]
    attended = {str(i) for i, block in enumerate(blocks) if block == "CrossAttnUpBlock2D"}
    for name, value in load_file(folder / UNET).items():
        layer, _, kind = name.rpartition(".")
        tensors[f"model.diffusion_model.{original_name(layer, 1, attended)}.{kind}"] = value
    for name, value in load_file(folder / "vae/diffusion_pytorch_model.safetensors").items():
        for pattern, replacement in _VAE.items():
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"\bup\.(\d)", lambda match: f"up.{3 - int(match[1])}", name)
        attention = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        tensors[f"first_stage_model.{name}"] = value[..., None, None] if attention else value
    for name, value in load_file(folder / "text_encoder/model.safetensors").items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    return file
