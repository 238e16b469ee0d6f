"""A policy base for tests that need a formula and no checkpoint."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignkit.interfaces import Policy
from alignkit.records import PolicySettings


class BarePolicy(Policy, ABC):
    """Base of policies by formula: 1000 integer times, pixels as features, weights in a file."""

    image_size = 8

    @classmethod
    def serves(cls, source: str) -> bool:
        return False

    @classmethod
    def load(cls, source: str, settings: PolicySettings) -> Self:
        return cls()

    def times(self) -> Tensor:
        return torch.arange(1000)

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> Path:
        save_file({name: value.detach().clone() for name, value in weights.items()}, folder / "weights.safetensors")
        return folder / "weights.safetensors"

    def read_export(self, folder: Path) -> dict[str, Tensor]:
        return load_file(folder / "weights.safetensors")
