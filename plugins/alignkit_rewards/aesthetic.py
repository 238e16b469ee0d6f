"""LAION's aesthetic predictors, which estimate how people would rate an image from 1 to 10 regardless of the prompt.

https://github.com/christophschuhmann/improved-aesthetic-predictor (v2) and
https://github.com/LAION-AI/aesthetic-predictor (v1), both a head on CLIP ViT-L/14.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from alignkit import Example
from alignkit.errors import ConfigError
from alignkit_rewards.checkpoints import check_local, locate_file
from alignkit_rewards.clip import ClipImages
from alignkit_rewards.linear import fold
from alignkit_rewards.published import read_weights


@dataclass
class Aesthetic(ClipImages):
    """Aesthetic rating of an image, regardless of its prompt: w · e + b of CLIP's unit vector e.

    The ratings it was trained on run from 1 to 10; typical values are 5 to 6. The five published layers have no
    activations between them and are folded into w and b.
    """

    checkpoint: str = "openai/clip-vit-large-patch14"
    """Hub id or local folder of a CLIPModel."""
    head: str = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"
    """The published head, on disk or as owner/name/file on the hub: v2 (sac+logos+ava1-l14-linearMSE.pth), or v1, a
    single layer (sa_0_4_vit_l_14_linear.pth)."""

    name: ClassVar[str] = "aesthetic"

    def check(self, examples: Iterable[Example]) -> None:
        super().check(examples)
        check_local(self.name, "head", self.head)

    def load(self, device: torch.device) -> None:
        weight, bias = self._read_head()
        super().load(device)
        size = self._model.config.projection_dim
        if len(weight) != size:
            raise ConfigError(
                f"aesthetic: the head {self.head!r} takes vectors of {len(weight)} numbers and the checkpoint "
                f"{self.checkpoint!r} produces {size}; expected a head trained on this CLIP model"
            )
        self._weight, self._bias = weight.to(device), bias.to(device)

    def _read_head(self) -> tuple[Tensor, Tensor]:
        file = locate_file(self.name, "head", self.head)
        if file is None:
            raise ConfigError(
                f"aesthetic: head is {self.head!r}, expected a file, or owner/name/file on the hub; set "
                "reward.aesthetic.head to such a file"
            )
        try:
            return fold(read_weights(self.name, "head", file))
        except ValueError as error:
            raise ConfigError(f"aesthetic: the head {self.head!r} is not one of LAION's heads: {error}") from error

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        return self.image_features(images) @ self._weight + self._bias
