"""Find the model bundle that a name, a hub id or a folder stands for, and the policy class that serves it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from alignkit.errors import AlignkitError, ConfigError
from alignkit.files import read_json
from alignkit.interfaces import ModelBundle, Policy
from alignkit.records import PolicySettings
from alignkit.registry import Registry, default_registry

INDEX = "model_index.json"
"""The file that lists the parts of a diffusers pipeline."""
MANY_STEPS = {"sampler": {"name": "ddim", "num_steps": 25, "eta": 0.0}}
"""Settings for a folder whose policy suggests none."""


def find_bundle(name: str, registry: Registry | None = None) -> ModelBundle:
    """Return the registered model of this name or at this hub id, else a bare bundle around a hub id, folder or file.

    Raises AlignkitError, with the nearest name, for what is none of these.
    """
    registry = registry or default_registry()
    registered = any(row.kind == "model" for row in registry.named(name))
    if not registered and Path(name).exists():
        serving = list(_serving(name, registry)[0].values())
        if not serving:
            raise ConfigError(f"model.name: {_unserved(name)}")
        own = serving[0].facts(name, PolicySettings(trainable=False)).defaults if len(serving) == 1 else {}
        return ModelBundle(path=name, defaults={**MANY_STEPS, **own})
    if not registered and name.endswith((".safetensors", ".ckpt")):
        raise ConfigError(f"model.name: there is no file {name}")
    if not registered and is_hub_id(name):
        return _at_hub_id(name, registry) or ModelBundle(path=name)
    if not registered and "/" in name:
        raise ConfigError(f"model.name: there is no folder {name}, and a hub id has the form owner/name")
    bundle: ModelBundle = registry.get("model", name)
    return bundle


def find_policy(source: str, name: str = "", key: str = "model", registry: Registry | None = None) -> type[Policy]:
    """Return the policy class `name`, or where it is empty the only registered one that serves `source`.

    Raises ConfigError, in one line that begins with `key`, where none or several do; AlignkitError for an unknown name.
    """
    registry = registry or default_registry()
    if name:
        if not Path(source).exists() and not is_hub_id(source):
            raise ConfigError(f"{key}: {_unserved(source)}")
        named: type[Policy] = registry.get("policy", name)
        return named
    serving, broken = _serving(source, registry)
    if len(serving) > 1:
        raise ConfigError(f"model.policy: {' and '.join(serving)} both serve {source}; set model.policy to one of them")
    if not serving:
        raise ConfigError("; ".join([f"{key}: {_unserved(source)}", *broken]))
    return next(iter(serving.values()))


def is_checkpoint(folder: Path, registry: Registry | None = None) -> bool:
    """Whether a folder holds what a policy serves."""
    return bool(_serving(str(folder), registry or default_registry())[0])


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form owner/name."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None


def read_index(folder: Path) -> dict[str, Any]:
    """Return the parts of the diffusers pipeline in a folder, by name. Raises ConfigError for an unreadable index."""
    index = folder / INDEX
    try:
        parts = read_json(index)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: {index} is not a readable pipeline index ({error})") from error
    return parts if isinstance(parts, dict) else {}


def _serving(source: str, registry: Registry) -> tuple[dict[str, type[Policy]], list[str]]:
    """Return the policies that serve `source`, by name, and a message for each that cannot be imported or fails."""
    serving: dict[str, type[Policy]] = {}
    broken: list[str] = []
    for row in registry.components("policy"):
        try:
            if not row.broken and (policy := registry.get("policy", row.name)).serves(source):
                serving[row.name] = policy
        except AlignkitError as error:
            broken.append(str(error))
        except Exception as error:  # one broken plugin must not end runs on models that others serve
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            broken.append(f"policy {row.name} ({row.origin}) failed: {reason}")
    return serving, broken


def _unserved(source: str) -> str:
    """Return a message for a source that no policy serves."""
    folder = Path(source)
    if folder.is_file():
        return (
            f"no policy serves the file {source}; expected a whole checkpoint of Stable Diffusion or SDXL (a UNet "
            "alone goes to model.unet, a LoRA to model.adapter)"
        )
    if not folder.is_dir():
        if is_hub_id(source):
            return f"no policy serves the hub id {source} (`alignkit list policies`)"
        return f"{source!r} is no folder and no hub id of the form owner/name"
    if not (folder / INDEX).is_file():
        return f"the folder {source} holds no diffusers pipeline ({INDEX} is missing), and no policy serves it"
    kind = read_index(folder).get("_class_name", "pipeline of no class")
    return (
        f"no policy serves {source}, a {kind}; expected a text-to-image pipeline with a UNet, a VAE and a scheduler, "
        "or a plugin for others (`alignkit list policies`)"
    )


def _at_hub_id(source: str, registry: Registry) -> ModelBundle | None:
    """Return the registered model of the pipeline at this hub id, unless it replaces a part of the pipeline."""
    for row in registry.components("model"):
        try:
            bundle: ModelBundle | None = None if row.broken else registry.get("model", row.name)
        except AlignkitError:
            continue  # a run that names this model reports the error
        if bundle and bundle.path == source and not {"unet", "adapter"} & bundle.defaults.get("model", {}).keys():
            return bundle
    return None
