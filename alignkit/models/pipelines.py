"""Load diffusers pipelines, with the UNet or a LoRA of another checkpoint where one is named."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor

from alignkit.config.bundles import INDEX, is_hub_id, read_index
from alignkit.errors import AlignkitError, ConfigError
from alignkit.models.hub import unreachable
from alignkit.models.quiet import errors_only, no_progress_bars

LORA_FILE = "pytorch_lora_weights.safetensors"
"""Name of a LoRA file in diffusers, in peft and in a run folder."""


NETWORKS = "unet", "vae", "scheduler"
"""Parts that every pipeline here has."""


def is_pipeline(source: str) -> bool:
    """Whether `source` is a folder with the index of a pipeline that has a UNet, or a hub id, which is not looked up.

    Raises ConfigError for an index that cannot be read.
    """
    folder = Path(source)
    if not folder.exists():
        return is_hub_id(source)
    parts = read_index(folder) if (folder / INDEX).is_file() else {}
    return all((parts.get(name) or [None])[0] for name in NETWORKS)


def scheduler_of(source: str) -> tuple[str, dict[str, Any]]:
    """Return the class of a pipeline's scheduler and its config; for a hub id, which is not looked up, "" and none.

    Raises ConfigError for a folder that holds no pipeline.
    """
    check_source(source)
    if not Path(source).is_dir():
        return "", {}
    _, name = read_index(Path(source))["scheduler"]
    with _blamed_on("model", source, "a diffusers pipeline"):
        return name, DDPMScheduler.load_config(source, subfolder="scheduler")


def noise_levels(config: Mapping[str, Any]) -> Tensor:
    """Return alpha^2 at each time of a scheduler's config, (T,)."""
    levels: Tensor = DDPMScheduler.from_config(config).alphas_cumprod
    return levels


def check_source(source: str) -> None:
    """Raise ConfigError for a folder that is missing or has no index. A hub id is not looked up."""
    folder = Path(source)
    if not folder.is_dir() and (folder.exists() or not is_hub_id(source)):
        raise ConfigError(f"model: {source!r} is no folder and no hub id of the form owner/name")
    if folder.is_dir() and not (folder / INDEX).is_file():
        raise ConfigError(f"model: the folder {source} holds no diffusers pipeline ({INDEX} is missing)")


def locate_weights(key: str, source: str) -> tuple[str, str]:
    """Return the folder or hub id of weights, and the file in it ("" if none is named). A hub id is not looked up.

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
    """Load the pipeline at a folder or hub id.

    `unet` replaces its UNet, `adapter` is a LoRA that is merged into it, and `guidance_embedding` above 0 is the width
    of an input for the guidance that is added. Raises ConfigError for what is missing or does not fit.
    """
    check_source(source)
    with no_progress_bars():
        folder, file = locate_weights("model.unet", unet) if unet else ("", "")
        given: dict[str, Any] = {}
        if unet and not file:
            with _blamed_on("model.unet", unet, "a UNet of diffusers"):
                given["unet"] = UNet2DConditionModel.from_pretrained(folder, dtype=dtype)
        with _blamed_on("model", source, "a diffusers pipeline"):
            index = DiffusionPipeline.load_config(source)
            with errors_only():  # its module warns about processors of images that no pipeline here calls
                getattr(diffusers, str(index.get("_class_name")), None)
            optional = {"safety_checker": None} if "safety_checker" in index else {}
            pipe = DiffusionPipeline.from_pretrained(source, dtype=dtype, **optional, **given)
        missing = [name for name in NETWORKS if getattr(pipe, name, None) is None]
        if missing:
            raise ConfigError(
                f"model: {source} is a {type(pipe).__name__} without {', '.join(missing)}; "
                "expected a text-to-image pipeline with a UNet"
            )
        if file:
            with _blamed_on("model.unet", unet, f"the UNet of {source}"):
                local = Path(folder) / file
                pipe.unet.load_state_dict(load_file(local if local.is_file() else hf_hub_download(folder, file)))
        if adapter:
            folder, file = locate_weights("model.adapter", adapter)
            with _blamed_on("model.adapter", adapter, f"a LoRA for {source}"), errors_only():
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
    """Return the same network with an input of this width for the guidance.

    The input starts with zero weights, so it changes nothing before it is trained. Raises ConfigError for a network
    that has such an input already.
    """
    if unet.config.time_cond_proj_dim:
        raise ConfigError(
            f"model.guidance_embedding: found {width} for a network that takes the guidance already, expected 0"
        )
    wide = UNet2DConditionModel.from_config(unet.config, time_cond_proj_dim=width).to(unet.device, unet.dtype)
    wide.load_state_dict(unet.state_dict(), strict=False)
    torch.nn.init.zeros_(wide.time_embedding.cond_proj.weight)
    return wide


@contextmanager
def _blamed_on(key: str, source: str, what: str) -> Iterator[None]:
    """Turn any error while loading into a ConfigError of one line that names `key` and `source`."""
    try:
        yield
    except AlignkitError:
        raise
    except Exception as error:  # tensors of a stranger's file can break a library anywhere
        if unreachable(error):
            raise ConfigError(
                f"{key}: {source} is not on this disk, and the hub (https://huggingface.co) cannot be reached; connect "
                "this machine, or name a folder"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{key}: {source} cannot be loaded as {what}: {reason}") from error
