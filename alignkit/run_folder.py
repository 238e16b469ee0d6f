"""The files of a run folder that stand beside its checkpoints and its record."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from alignkit import checkpoint
from alignkit.config import RunConfig, to_toml
from alignkit.diffusers_policy import DiffusersPolicy
from alignkit.environment import environment
from alignkit.errors import AlignkitError, ConfigError
from alignkit.interfaces import Surrogate
from alignkit.parts import SURROGATE_FILE


def claim(folder: Path, config: RunConfig) -> None:
    """Make the folder of a new run and write `run.toml`. Raises ConfigError if it holds anything."""
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(
            f"output: {folder} exists and is not empty; name another with --out, or go on with "
            f"alignkit train --resume {folder}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output: {folder} cannot be made ({error.strerror})") from error
    write_settings(folder, config)


def write_settings(folder: Path, config: RunConfig) -> None:
    """Write `run.toml`: the settings, every default filled in."""
    checkpoint.write_file(folder / "run.toml", to_toml(config))


def free(folder: Path) -> Path:
    """The folder, or where it holds something the first of folder-2, folder-3, ... that does not."""
    names = chain([folder], (folder.with_name(f"{folder.name}-{number}") for number in count(2)))
    return next(name for name in names if not name.exists() or (name.is_dir() and not any(name.iterdir())))


def release(folder: Path) -> None:
    """Remove the folder of a new run that came no further than loading."""
    shutil.rmtree(folder, ignore_errors=True)  # what ended the run is told, and not this


def note_environment(folder: Path) -> None:
    """Write `environment.json`: where this part of the run takes place."""
    checkpoint.write_file(folder / "environment.json", json.dumps(environment(), indent=1))


def export(folder: Path, policy: DiffusersPolicy, average: Mapping[str, Tensor], surrogate: Surrogate | None) -> None:
    """What is taken away: the average weights for plain diffusers, and the surrogate for a later run."""
    partial = folder / ".export.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        policy.export(partial, average)
        if surrogate is not None:
            tensors = {n: t.detach().cpu().contiguous() for n, t in surrogate.module().state_dict().items()}
            save_file(tensors, partial / SURROGATE_FILE)
        for path in partial.iterdir():
            target = folder / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
        partial.rmdir()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise AlignkitError(
            f"{folder}: the trained weights could not be written ({error}); make room and run "
            f"alignkit train --resume {folder}"
        ) from error
