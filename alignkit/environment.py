"""Where things take place: what `environment.json` says, and the device that `--device` names."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

import torch

from alignkit.errors import ConfigError

LIBRARIES = ("alignkit", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")


def find_device(name: str) -> torch.device:
    """The device that `--device` names; "auto" is CUDA where it is there. Raises ConfigError for one that is not."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ConfigError(f"--device {name}: cannot be used ({reason}); expected auto, cpu or cuda:0") from error
    return device


def environment() -> dict[str, Any]:
    """Versions, plugins, source commit and hardware, as JSON values; None where something is not there."""
    plugins = {point.dist.name: point.dist.version for point in entry_points(group="alignkit") if point.dist}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in LIBRARIES},
        "plugins": dict(sorted(plugins.items())),
        "git": _git_commit(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the working directory, with "-dirty" behind it where files were changed."""
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
