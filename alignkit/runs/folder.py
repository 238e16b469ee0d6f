"""The files of a run folder other than its checkpoints and its record."""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, entry_points, version
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from alignkit.config.load import RunConfig, to_toml
from alignkit.errors import AlignkitError, ConfigError
from alignkit.files import share, write_file
from alignkit.interfaces import Policy, Surrogate
from alignkit.models.lora_files import note
from alignkit.models.pipelines import LORA_FILE
from alignkit.runs.build import SURROGATE_FILE


def claim(folder: Path, config: RunConfig) -> None:
    """Make the folder of a new run and write `run.toml`. Raises ConfigError if it holds anything."""
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(
            f"output: {folder} exists and is not empty; name another with --out, or resume the run in it with "
            f"alignkit train --resume {folder}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output: {folder} cannot be made ({error.strerror})") from error
    write_settings(folder, config)


def write_settings(folder: Path, config: RunConfig) -> None:
    """Write `run.toml`: the settings, every default filled in."""
    write_file(folder / "run.toml", to_toml(config))


def free(folder: Path) -> Path:
    """Return the folder if it is new or empty, else the first of folder-2, folder-3, ... that is."""
    names = chain([folder], (folder.with_name(f"{folder.name}-{number}") for number in count(2)))
    return next(name for name in names if not name.exists() or (name.is_dir() and not any(name.iterdir())))


def release(folder: Path) -> None:
    """Remove the folder of a new run that failed while loading."""
    shutil.rmtree(folder, ignore_errors=True)  # the error that ended the run is reported, not this one


def note_environment(folder: Path) -> None:
    """Write `environment.json`: the machine and the versions of this part of the run."""
    write_file(folder / "environment.json", json.dumps(environment(), indent=1))


def export_weights(folder: Path, policy: Policy, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write weights as the policy exports them, and return where they are. A LoRA file gets the `metadata`."""
    exported = policy.export(folder, weights)
    if exported.name == LORA_FILE:
        note(exported, metadata)
    return exported


def export(
    folder: Path,
    policy: Policy,
    weights: Mapping[str, Tensor],
    surrogate: Surrogate | None,
    metadata: Mapping[str, str],
) -> Path:
    """Write the results of the run, weights and surrogate, and return where the weights are."""
    partial = folder / ".export.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        exported = export_weights(partial, policy, weights, metadata)
        if surrogate is not None:
            tensors = {n: t.detach().cpu().contiguous() for n, t in surrogate.module().state_dict().items()}
            save_file(tensors, partial / SURROGATE_FILE)
        share(partial)
        for path in partial.iterdir():
            target = folder / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
        partial.rmdir()
        return folder / exported.name
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise AlignkitError(
            f"{folder}: the trained weights could not be written ({error}); make room and resume with "
            f"alignkit train --resume {folder}"
        ) from error


LIBRARIES = ("alignkit", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")


def environment() -> dict[str, Any]:
    """Return versions, plugins, source commit and hardware as JSON values; None for what is missing."""
    distributions = {point.dist for point in entry_points(group="alignkit") if point.dist}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in LIBRARIES},
        "plugins": dict(sorted((one.name, one.version) for one in distributions)),
        "git": _git_commit(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


@functools.cache
def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of the working directory, with "-dirty" appended if files were changed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
