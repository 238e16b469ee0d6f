"""PickScore: human preference between images of one prompt (Kirstain et al., "Pick-a-Pic", 2305.01569)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from alignkit import Example, Scores
from alignkit_rewards.clip import ClipReward

Variant = Literal["logit", "cosine"]


@dataclass
class PickScore(ClipReward):
    """exp(logit_scale) times the cosine of image and prompt in a CLIP ViT-H/14 trained on human choices.

    About 19 to 23 for images of Stable Diffusion. Part "truncated": 1 if the prompt has more tokens than CLIP reads
    (77).
    """

    checkpoint: str = "yuvalkirstain/PickScore_v1"
    """Hub id or local folder of a CLIPModel."""
    variant: Variant = "logit"
    """logit: with the learned scale (about 100), so that differences are log-odds of a choice; cosine: without it, as
    in SDPO and RG-LCD."""

    name: ClassVar[str] = "pickscore"
    public_tokenizer: ClassVar[str] = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Scores:
        cosine, parts = self.cosine(images, examples)
        values = cosine * (self._logit_scale if self.variant == "logit" else 1.0)
        return Scores(values, torch.ones_like(values, dtype=torch.bool), parts)
