"""Loading diffusers pipelines, with a UNet or a LoRA of another checkpoint where one is named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file

from alignkit.errors import ConfigError
from alignkit.models.quiet import errors_only, no_progress_bars

LORA_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers, peft and a run folder call a LoRA."""


def check_source(source: str, key: str = "model") -> None:
    """Raise ConfigError for a folder that is missing or holds no pipeline. A hub id is not looked up."""
    folder = Path(source)
    looks_local = folder.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1
    if looks_local and not folder.is_dir():
        raise ConfigError(f"{key}: {source!r} is no folder and no hub id of the form owner/name")
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ConfigError(f"{key}: the folder {source} holds no diffusers pipeline (model_index.json is missing)")


def locate_weights(key: str, source: str) -> tuple[str, str]:
    """Folder or hub id of weights, and the file in it ("" if none is named). A hub id is not looked up.

    Raises ConfigError, under the name `key`, for what can be neither.
    """
    path = Path(source)
    if path.is_file() and path.suffix == ".safetensors":
        return str(path.parent), path.name
    if path.is_dir():
        return source, ""
    named = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:/(.+\.safetensors))?", source)
    if named is None or named[1].endswith(".safetensors"):
        raise ConfigError(
            f"{key}: {source!r} is no folder, no .safetensors file and no hub id of the form owner/name or "
            "owner/name/file.safetensors"
        )
    return named[1], named[2] or ""


def load_pipeline(
    source: str, dtype: torch.dtype = torch.float32, *, unet: str = "", adapter: str = "", guidance_embedding: int = 0
) -> Any:
    """The pipeline at a local folder or hub id, with the UNet of `unet` in the place of its own, the LoRA of `adapter`
    merged into it, and an input of this width for the guidance. Raises ConfigError for what is not there or does not
    fit."""
    check_source(source)
    with no_progress_bars():
        folder, file = locate_weights("model.unet", unet) if unet else ("", "")
        given: dict[str, Any] = {}
        if unet and not file:
            with _told("model.unet", unet, "a UNet of diffusers"):
                given["unet"] = UNet2DConditionModel.from_pretrained(folder, dtype=dtype)
        with _told("model", source, "a diffusers pipeline"):
            index = DiffusionPipeline.load_config(source)
            optional = {"safety_checker": None} if "safety_checker" in index else {}
            pipe = DiffusionPipeline.from_pretrained(source, dtype=dtype, **optional, **given)
        missing = [name for name in ("unet", "vae", "scheduler") if getattr(pipe, name, None) is None]
        if missing:
            raise ConfigError(
                f"model: {source} is a {type(pipe).__name__} without {', '.join(missing)}; "
                "expected a text-to-image pipeline with a UNet"
            )
        if file:
            with _told("model.unet", unet, f"the UNet of {source}"):
                local = Path(folder) / file
                pipe.unet.load_state_dict(load_file(local if local.is_file() else hf_hub_download(folder, file)))
        if adapter:
            folder, file = locate_weights("model.adapter", adapter)
            with _told("model.adapter", adapter, f"a LoRA for {source}"), errors_only():
                pipe.load_lora_weights(folder, weight_name=file or LORA_FILE)
                if not pipe.get_list_adapters().get("unet"):
                    raise ValueError("it names no layer of the UNet")
                pipe.fuse_lora()
                pipe.unload_lora_weights()
    if guidance_embedding:
        pipe.register_modules(unet=with_guidance(pipe.unet, guidance_embedding))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_guidance(unet: UNet2DConditionModel, width: int) -> UNet2DConditionModel:
    """The same network with an input of this width for the guidance, which changes nothing before it is trained.

    Raises ConfigError for one that has such an input.
    """
    if unet.config.time_cond_proj_dim:
        raise ConfigError(
            f"model.guidance_embedding: found {width} for a network that takes the guidance as it is, expected 0"
        )
    wide = UNet2DConditionModel.from_config(unet.config, time_cond_proj_dim=width).to(unet.device, unet.dtype)
    wide.load_state_dict(unet.state_dict(), strict=False)
    torch.nn.init.zeros_(wide.time_embedding.cond_proj.weight)
    return wide


@contextmanager
def _told(key: str, source: str, what: str) -> Iterator[None]:
    """What goes wrong inside becomes a ConfigError of one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{key}: {source} cannot be loaded as {what}: {reason}") from error
