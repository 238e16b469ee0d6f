"""Load diffusers pipelines, with the UNet or an adapter of another checkpoint where one is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from alignkit.config.bundles import INDEX, is_hub_id, read_index
from alignkit.errors import ConfigError
from alignkit.models.adapters import LORA_FILE, Adapter, merge, open_adapter
from alignkit.models.fit import check_configs, noise_levels, unet_shapes
from alignkit.models.quiet import errors_only, no_progress_bars
from alignkit.models.single_file import check_whole, configs_of, is_whole, load_whole
from alignkit.models.weight_files import (
    WHOLE,
    Shapes,
    blamed_on,
    check_parts,
    files_of,
    find_file,
    locate_weights,
    on_disk,
    read_shapes,
    read_tensors,
    some,
    variant_in,
)

__all__ = ["LORA_FILE", "check_pipeline", "is_pipeline", "load_pipeline", "load_unet", "noise_levels", "scheduler_of"]

NETWORKS = "unet", "vae", "scheduler"
"""Parts that every pipeline here has."""
PARTS = *NETWORKS, "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"
"""Parts that are loaded where a pipeline has them."""


@dataclass(frozen=True)
class Files:
    """The checkpoint of a pipeline, and what replaces or changes parts of it."""

    source: str
    """A folder, a hub id, or a file that holds a whole checkpoint."""
    unet: str = ""
    """Replaces its UNet."""
    adapter: str = ""
    """Merged into its UNet."""
    variant: str = ""
    """Ending of the files of weights ("fp16"); empty: none, or the only one there is."""
    config: str = ""
    """Folder or hub id of the configs of a checkpoint of one file; empty: those of its kind, from the hub."""
    allow_pickle: bool = False
    """Whether weights may be pickled."""
    prediction: str = ""
    """Type of the network's output where it is not the scheduler's."""


def is_pipeline(source: str) -> bool:
    """Whether `source` is a folder with the index of a pipeline that has a UNet, a file with a whole checkpoint, or a
    hub id, which is not looked up.

    Raises ConfigError for an index that cannot be read.
    """
    path = Path(source)
    if path.is_file():
        return is_whole(path)
    if not path.exists():
        return is_hub_id(source)
    parts = read_index(path) if (path / INDEX).is_file() else {}
    return all((parts.get(name) or [None])[0] for name in NETWORKS)


def scheduler_of(source: str, config: str = "") -> tuple[str, dict[str, Any]]:
    """Return the class of a pipeline's scheduler and its config; "" and none where they are not on this disk.

    Raises ConfigError for a folder that holds no pipeline.
    """
    check_source(source)
    folder = configs_folder(Files(source, config=config))
    if folder is None or not (folder / INDEX).is_file():
        return "", {}
    name = (read_index(folder).get("scheduler") or [None, ""])[1]
    with blamed_on("model", source, "a diffusers pipeline"):
        return name, DDPMScheduler.load_config(folder, subfolder="scheduler")


def check_source(source: str) -> None:
    """Raise ConfigError for a folder that is missing or has no index. A hub id is not looked up."""
    path = Path(source)
    if not path.exists() and not is_hub_id(source):
        raise ConfigError(f"model: {source!r} is no folder and no hub id of the form owner/name")
    if path.is_dir() and not (path / INDEX).is_file():
        raise ConfigError(f"model: the folder {source} holds no diffusers pipeline ({INDEX} is missing)")


def configs_folder(files: Files) -> Path | None:
    """Return the folder with the configs of a checkpoint; None where they are not, or not all, on this disk."""
    if Path(files.source).is_file():
        return configs_of(files.source, files.config, files.allow_pickle)
    folder = on_disk(files.source)
    if folder is None or Path(files.source).exists():
        return folder
    index = read_index(folder) if (folder / INDEX).is_file() else {}
    parts = [name for name in PARTS if (index.get(name) or [None])[0]]
    return folder if parts and all(any((folder / name).glob("*.json")) for name in parts) else None


def check_pipeline(files: Files) -> list[str]:
    """Open the configs and headers of what `load_pipeline` would load; return a line for what would not be used.

    Hub ids that are not on this disk are left alone. Raises ConfigError, in one line, for what is missing or unfit.
    """
    check_source(files.source)
    unet, unet_file = locate_weights("model.unet", files.unet, files.allow_pickle) if files.unet else ("", "")
    adapter, file = locate_weights("model.adapter", files.adapter, files.allow_pickle) if files.adapter else ("", "")
    folder, here = configs_folder(files), Path(files.source)
    other = on_disk(unet) if unet and not unet_file else None
    if folder is None or (unet and not unet_file and other is None):
        return []
    shapes = unet_shapes(check_configs(folder, other, files.prediction))
    variant = _check_parts(files, folder, unet and not unet_file) if here.is_dir() else ""
    if other is not None and Path(unet).is_dir():
        chosen = check_parts(other.resolve().parent, [other.resolve().name], "", files.allow_pickle)
        _check_unet("model.unet", other, chosen, shapes)
    elif not unet and here.is_dir():
        _check_unet("model", folder / "unet", variant, shapes)
    elif not unet and here.is_file():
        check_whole(here, shapes, folder)
    if unet_file:
        with blamed_on("model.unet", files.unet, f"the UNet of {files.source}"):
            if (path := find_file(unet, unet_file, (), files.allow_pickle, fetch=False)) is not None:
                _fits(read_shapes(path), shapes)
    if not adapter:
        return []
    with blamed_on("model.adapter", files.adapter, f"a LoRA for {files.source}"):
        opened = open_adapter(adapter, file, shapes, allow_pickle=files.allow_pickle, weights=False)
    return [f"model.adapter: {files.adapter}: {opened.note()}"] if opened and opened.unused else []


def _check_parts(files: Files, folder: Path, other_unet: object) -> str:
    """Check the files of weights of all networks that are loaded from a folder, and return their variant."""
    index = read_index(folder)
    names = ["vae", "text_encoder", "text_encoder_2", *([] if other_unet else ["unet"])]
    return check_parts(
        folder, [name for name in names if (index.get(name) or [None])[0]], files.variant, files.allow_pickle
    )


def _check_unet(key: str, folder: Path, variant: str, shapes: Shapes) -> None:
    """Raise ConfigError for headers of a UNet that do not fit its config; further tensors do not matter."""
    with blamed_on(key, str(folder), "a UNet of diffusers"):
        found: dict[str, tuple[int, ...]] = {}
        for file in files_of(folder, variant):
            found |= read_shapes(file) if file.suffix != ".json" else {}
        _fits({name: shape for name, shape in found.items() if name in shapes}, shapes)


def _fits(found: Shapes, expected: Shapes) -> None:
    """Raise ValueError, with the names, unless these are the tensors of a network."""
    if any(name.startswith(WHOLE) for name in found):
        raise ValueError("it holds a whole checkpoint; name it as model.name")
    other = [
        f"{name} {shape} in the place of {expected[name]}"
        for name, shape in found.items()
        if name in expected and shape != expected[name]
    ]
    groups = {
        "has tensors that the UNet does not have": [name for name in found if name not in expected],
        "lacks": [name for name in expected if name not in found],
        "has tensors of other shapes": other,
    }
    if wrong := [f"it {what}: {some(names)}" for what, names in groups.items() if names]:
        raise ValueError("; ".join(wrong))


def load_pipeline(files: Files, dtype: torch.dtype = torch.float32, guidance_embedding: int = 0) -> Any:
    """Load a pipeline.

    `guidance_embedding` above 0 is the width of an input for the guidance that is added to its UNet. Raises
    ConfigError for what is missing or does not fit.
    """
    check_pipeline(files)
    safe = None if files.allow_pickle else True
    with no_progress_bars(), errors_only():
        unet, file = locate_weights("model.unet", files.unet, files.allow_pickle) if files.unet else ("", "")
        given: dict[str, Any] = {}
        if unet and not file:
            with blamed_on("model.unet", unet, "a UNet of diffusers"):
                given["unet"] = UNet2DConditionModel.from_pretrained(
                    unet, dtype=dtype, use_safetensors=safe, variant=variant_in(unet, "")
                )
        with blamed_on("model", files.source, "a diffusers pipeline"):
            pipe = _load(files, dtype, safe, given)
        missing = [name for name in NETWORKS if getattr(pipe, name, None) is None]
        if missing:
            raise ConfigError(
                f"model: {files.source} is a {type(pipe).__name__} without {', '.join(missing)}; "
                "expected a text-to-image pipeline with a UNet"
            )
        if file:
            with blamed_on("model.unet", files.unet, f"the UNet of {files.source}"):
                path = find_file(unet, file, (), files.allow_pickle, fetch=True)
                tensors = read_tensors(path) if path is not None else {}
                _fits(_shapes(tensors), _shapes(pipe.unet.state_dict()))
                pipe.unet.load_state_dict(tensors)
        if files.adapter:
            with blamed_on("model.adapter", files.adapter, f"a LoRA for {files.source}"):
                merge(pipe.unet, _adapter(files, _shapes(pipe.unet.state_dict())))
    if guidance_embedding:
        pipe.register_modules(unet=with_guidance(pipe.unet, guidance_embedding))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _load(files: Files, dtype: torch.dtype, safe: bool | None, given: dict[str, Any]) -> Any:
    here = Path(files.source)
    if here.is_file():
        return load_whole(here, files.config, files.allow_pickle, dtype, given)
    index = DiffusionPipeline.load_config(files.source)
    optional = {"safety_checker": None} if "safety_checker" in index else {}
    variant = _check_parts(files, here, given) if here.is_dir() else files.variant
    return DiffusionPipeline.from_pretrained(
        files.source, dtype=dtype, use_safetensors=safe, variant=variant or None, **optional, **given
    )


def _adapter(files: Files, shapes: Shapes) -> Adapter:
    source, file = locate_weights("model.adapter", files.adapter, files.allow_pickle)
    found = open_adapter(source, file, shapes, allow_pickle=files.allow_pickle, weights=True)
    if found is None:
        raise ValueError("it is not on this disk")
    return found


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def load_unet(source: str) -> UNet2DConditionModel:
    """Load the UNet of a pipeline at a folder, file or hub id. Raises OSError or ValueError, as diffusers does."""
    if Path(source).is_file():
        return load_pipeline(Files(source)).unet
    with no_progress_bars():
        return UNet2DConditionModel.from_pretrained(source, subfolder="unet", variant=variant_in(source, "unet"))


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
