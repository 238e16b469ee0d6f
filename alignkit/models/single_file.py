"""Checkpoints of one file, as other tools save Stable Diffusion: UNet, VAE and text encoders under original names.

The file holds no configs and no tokenizer. They come from a folder or hub id that the user names, else from the
pipeline of that kind at the hub.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from alignkit.config.bundles import INDEX, is_hub_id, read_index
from alignkit.errors import ConfigError
from alignkit.models.layer_names import layer_names, plain_name
from alignkit.models.weight_files import ALLOW, SAFE, WHOLE, Shapes, blamed_on, on_disk, read_shapes, some

CONFIGS = ["*.json", "*/*.json", "*/*.txt"]
"""Files of a pipeline that are no weights."""


def is_whole(file: Path) -> bool:
    """Whether a file holds a whole checkpoint; a .ckpt file is not opened."""
    if file.suffix == ".ckpt":
        return True
    try:
        return file.suffix in SAFE and any(name.startswith(WHOLE) for name in read_shapes(file))
    except (OSError, SafetensorError):
        return False


def configs_of(source: str, config: str, allow_pickle: bool) -> Path | None:
    """Return the folder with the configs for the checkpoint in a file; None if they are at the hub alone.

    Raises ConfigError for a pickled file without `allow_pickle`, and for a `config` that holds no pipeline.
    """
    if Path(source).suffix not in SAFE and not allow_pickle:
        raise ConfigError(f"model: found {source}; {ALLOW}")
    if config and not (Path(config) / INDEX).is_file() and not is_hub_id(config):
        raise ConfigError(f"model.config: {config!r} is no folder with a diffusers pipeline and no hub id")
    return on_disk(config or kind_of(Path(source)))


def kind_of(file: Path) -> str:
    """Return the hub id of a pipeline with the configs of the kind of checkpoint in a file."""
    with blamed_on("model", str(file), "a checkpoint"):
        tensors = {name: torch.empty(shape, device="meta") for name, shape in read_shapes(file).items()}
        return str(fetch_diffusers_config(tensors)["pretrained_model_name_or_path"])


def check_whole(file: Path, shapes: Shapes, configs: Path) -> None:
    """Raise ConfigError for a file whose UNet is not of these shapes."""
    with blamed_on("model", str(file), f"a checkpoint with the configs of {configs}"):
        names, found = layer_names(shapes), {}
        for name, shape in read_shapes(file).items():
            if name.startswith(WHOLE) and name.endswith(".weight"):
                found[names.get(plain_name(name.removesuffix(".weight")), "")] = shape
        for layer in set(names.values()):
            expected = shapes[f"{layer}.weight"]
            if layer not in found or math.prod(found[layer]) != math.prod(expected):
                raise ValueError(f"its {layer} has the shape {found.get(layer)}, expected {expected}; set model.config")


def load_whole(file: Path, config: str, allow_pickle: bool, dtype: torch.dtype, given: dict[str, Any]) -> Any:
    """Load the pipeline in a file with networks that are `given` in the place of its own."""
    folder = configs_of(str(file), config, allow_pickle)
    if folder is None:
        hub = config or kind_of(file)
        try:
            folder = Path(snapshot_download(hub, allow_patterns=CONFIGS))
        except OSError as error:
            raise ConfigError(
                f"model: {file} holds no configs and no tokenizer; those of {hub} are not on this disk, and the hub "
                f"cannot be reached; set model.config to a folder with such a pipeline"
            ) from error
    pipeline = getattr(diffusers, read_index(folder)["_class_name"])
    pipe = pipeline.from_single_file(str(file), config=str(folder), local_files_only=True, dtype=dtype, **given)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            empty = [key for key, tensor in part.state_dict().items() if tensor.is_meta]
            if empty:
                raise ValueError(f"it holds no weights for {len(empty)} tensors of {name}: {some(empty)}")
    return pipe
