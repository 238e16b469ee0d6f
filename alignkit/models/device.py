"""Find the device that `--device` names."""

from __future__ import annotations

import torch

from alignkit.errors import ConfigError


def find_device(name: str) -> torch.device:
    """Return the device that `--device` names; "auto" is CUDA if available. Raises ConfigError for a missing one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ConfigError(f"--device {name}: cannot be used ({reason}); expected auto, cpu or cuda:0") from error
    return device
