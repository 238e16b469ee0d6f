"""Find the model bundle that a name, a hub id or a folder stands for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from alignkit.errors import AlignkitError, ConfigError
from alignkit.interfaces import ModelBundle
from alignkit.registry import Registry, default_registry


def find_bundle(name: str, registry: Registry | None = None) -> ModelBundle:
    """The registered model of this name or at this hub id (owner/name), else a bare bundle around a hub id or a folder.

    Raises AlignkitError, with the nearest name, for what is none of these.
    """
    registry = registry or default_registry()
    registered = any(row.kind == "model" for row in registry.named(name))
    if not registered and Path(name).is_dir() and not (Path(name) / "model_index.json").is_file():
        raise ConfigError(f"model.name: the folder {name} holds no diffusers pipeline (model_index.json is missing)")
    if not registered and Path(name).is_dir():
        return ModelBundle(path=name, defaults=_suited(Path(name)))
    if not registered and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return _living_at(name, registry) or ModelBundle(path=name)
    if not registered and "/" in name:
        raise ConfigError(f"model.name: there is no folder {name}, and a hub id has the form owner/name")
    bundle: ModelBundle = registry.get("model", name)
    return bundle


def _living_at(source: str, registry: Registry) -> ModelBundle | None:
    """The registered model that is the pipeline at this hub id, and not one that exchanges a part of it."""
    for row in registry.components("model"):
        try:
            bundle: ModelBundle | None = None if row.broken else registry.get("model", row.name)
        except AlignkitError:
            continue  # somebody else's mistake, which is told to those who name that model
        if bundle and bundle.path == source and not {"unet", "adapter"} & bundle.defaults.get("model", {}).keys():
            return bundle
    return None


def _suited(folder: Path) -> dict[str, Any]:
    """The sampler that a local pipeline's scheduler stands for."""
    walk = {"name": "lcm"} if is_consistency(str(folder)) else {"name": "ddim", "num_steps": 25, "eta": 0.0}
    return {"sampler": walk}


def is_consistency(source: str, prediction: str = "") -> bool | None:
    """Whether a model is a latent consistency model, as `model.prediction` or the scheduler of its folder says.

    None for a hub id, which is not looked up.
    """
    index = Path(source) / "model_index.json"
    if prediction or not index.is_file():
        return prediction == "consistency" if prediction else None
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: {index} is no index of a diffusers pipeline ({error})") from error
    return isinstance(parts, dict) and "LCMScheduler" in (parts.get("scheduler") or ())
