"""CLIPScore: cosine similarity of image and prompt in CLIP (Hessel et al., "CLIPScore", 2104.08718)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from alignkit import Example, Scores
from alignkit_rewards.clip import ClipReward


@dataclass
class ClipScore(ClipReward):
    """Cosine of CLIP's image and text vectors, in [-1, 1].

    `scale`, `clamp` and `prefix` give the published variants. Part "truncated": 1 if the prompt has more tokens than
    CLIP reads (77).
    """

    checkpoint: str = "openai/clip-vit-large-patch14"
    """Hub id or local folder of a CLIPModel."""
    scale: float = 1.0
    """Factor on the cosine: 2.5 in the paper, 100 in torchmetrics."""
    clamp: bool = False
    """Whether negative cosines count as 0, as in the paper and torchmetrics; the gradient is 0 there too."""
    prefix: str = ""
    """Text put before each prompt: "A photo depicts " in the paper."""

    name: ClassVar[str] = "clip_score"
    public_tokenizer: ClassVar[str] = "openai/clip-vit-large-patch14"

    def text(self, example: Example) -> str:
        return self.prefix + example.text

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Scores:
        cosine, parts = self.cosine(images, examples)
        values = self.scale * (cosine.clamp(min=0) if self.clamp else cosine)
        return Scores(values, torch.ones_like(values, dtype=torch.bool), parts)
