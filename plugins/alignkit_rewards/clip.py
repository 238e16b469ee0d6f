"""Base classes of the rewards that embed images, and mostly texts too, with CLIP."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit

from alignkit import Example, Reward, check_ranges
from alignkit_rewards.checkpoints import (
    Precision,
    backbone_dtype,
    check_local,
    count,
    load_model,
    load_tokenizer,
    tokenize,
    tokenizer_source,
)
from alignkit_rewards.pixels import CLIP_MEAN, CLIP_STD, normalize, resize_and_crop


@dataclass
class ClipImages(Reward):
    """Frozen image tower and projection of a CLIPModel of transformers.

    Only the towers use `precision`. Projections, norms and dot products are float32: the cosines of one prompt's images
    differ in the third decimal, which half precision does not resolve.
    """

    checkpoint: str = ""
    """Hub id or local folder of a CLIPModel."""
    precision: Precision = "auto"
    """Precision of the towers: auto is bf16 on CUDA and fp32 elsewhere; fp16 is closer to fp32, bf16 is safer for
    gradients. Heads are always float32."""

    differentiable: ClassVar[bool] = True
    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_ranges(self)
        self._model: Any = None
        self._logit_scale = 1.0

    def check(self, examples: Iterable[Example]) -> None:
        check_local(self.name, "checkpoint", self.checkpoint)

    def load(self, device: torch.device) -> None:
        if self._model is None:
            from transformers import CLIPModel

            self._model = load_model(self.name, "checkpoint", self.folder(), CLIPModel)
            self._logit_scale = float(self._model.logit_scale.exp())
        self._model.to(device)
        for tower in (self._model.vision_model, self._model.text_model):
            tower.to(backbone_dtype(self.precision, device))

    def folder(self) -> str:
        """Return the hub id or folder of the CLIPModel, in transformers' layout."""
        return self.checkpoint

    def pixels(self, images: Tensor) -> Tensor:
        """Resize, crop and normalise images (N, 3, H, W) in [0, 1] for the vision tower."""
        size = self._model.config.vision_config.image_size
        return normalize(resize_and_crop(images, size), CLIP_MEAN, CLIP_STD)

    def image_features(self, images: Tensor) -> Tensor:
        """Return the images as unit vectors (N, D) float32, with gradient to the pixels."""
        pixels = self.pixels(images).to(self._model.vision_model.dtype)
        pooled = self._model.vision_model(pixel_values=pixels).pooler_output
        return unit(self._model.visual_projection(pooled.float()), dim=-1)


@dataclass
class ClipReward(ClipImages):
    """A CLIPModel of transformers with both towers, and its tokenizer."""

    tokenizer: str = ""
    """Hub id or local folder of the tokenizer. Empty: that of the checkpoint if it is a folder with a tokenizer, or
    else the public one."""

    public_tokenizer: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._tokenizer: Any = None

    def check(self, examples: Iterable[Example]) -> None:
        super().check(examples)
        check_local(self.name, "tokenizer", self.tokenizer)

    def load(self, device: torch.device) -> None:
        super().load(device)
        if self._tokenizer is None:
            source = tokenizer_source(self.tokenizer, self.checkpoint, self.public_tokenizer)
            self._tokenizer = load_tokenizer(self.name, source, self._model.config.text_config.vocab_size)

    def text(self, example: Example) -> str:
        """Return the text that is given to the text tower."""
        return example.text

    def tokens(self, example: Example) -> tuple[int, int] | None:
        return self._limit, count(self._tokenizer, self.text(example))

    @property
    def _limit(self) -> int:
        return int(self._model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return N texts as unit vectors (N, D) float32, and (N,) float32 that is 1 where a text was truncated."""
        distinct = list(dict.fromkeys(texts))
        tokens = tokenize(self._tokenizer, distinct, self._limit, self._model.device)
        pooled = self._model.text_model(input_ids=tokens.ids, attention_mask=tokens.mask).pooler_output
        features = unit(self._model.text_projection(pooled.float()), dim=-1)
        index = torch.tensor([distinct.index(text) for text in texts], device=features.device)
        return features[index], tokens.truncated[index]

    def cosine(self, images: Tensor, examples: Sequence[Example]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cosine (N,) of each image with its text, and the part "truncated"."""
        features, truncated = self.text_features([self.text(example) for example in examples])
        return (self.image_features(images) * features).sum(-1), {"truncated": truncated}
