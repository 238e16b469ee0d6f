"""LoRA files as other tools read them, made from the file that diffusers writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from alignkit.files import write_file

UNET = "unet."
DIFFUSERS = "lora_adapter_metadata"
"""The entry of a file's metadata in which diffusers keeps the settings of an adapter."""


def read_lora(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a LoRA file."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
    return load_file(file), dict(metadata)


def write_lora(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a LoRA file; equal contents give equal bytes. Raises AlignkitError if it cannot be written."""
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, dict(metadata))
    # safetensors writes the entries of metadata in random order.
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_file(file, len(text).to_bytes(8, "little") + text + content[8 + length :])


def scaled(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return the tensors of a LoRA, named as in diffusers, whose effect is `scale` times as large."""
    return {name: tensor * scale if ".lora_B." in name else tensor for name, tensor in tensors.items()}


def write_kohya(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write the file that kohya's scripts, ComfyUI, A1111 and Forge load: `lora_unet_...` with an alpha for each layer.

    Layers keep the names of diffusers, which all of these read.
    """
    found = convert_state_dict_to_kohya(dict(tensors))
    rank = str(json.loads(metadata[DIFFUSERS])[f"{UNET}r"])
    notes = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}
    kept = {name: value for name, value in metadata.items() if name != DIFFUSERS}
    write_lora(folder / "lora.safetensors", found, {**kept, **notes})
    return folder / "lora.safetensors"


def write_peft(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write an adapter folder that `PeftModel.from_pretrained(unet, folder)` loads."""
    config = {
        name.removeprefix(UNET): value
        for name, value in json.loads(metadata[DIFFUSERS]).items()
        if name.startswith(UNET)
    }
    config["peft_type"] = "LORA"
    write_file(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True))
    named = {f"base_model.model.{name.removeprefix(UNET)}": tensor for name, tensor in tensors.items()}
    write_lora(folder / "adapter_model.safetensors", named, {"format": "pt"})
    return folder


def note(file: Path, metadata: Mapping[str, str]) -> None:
    """Add entries to the metadata of a LoRA file."""
    tensors, found = read_lora(file)
    write_lora(file, tensors, {**found, **metadata})
