"""ImageReward: human preference, learned from comparisons of images of one prompt (Xu et al., 2304.05977).

BLIP encodes the prompt with cross-attention to the image, and a head maps the first token to a number. It uses classes
of transformers with the authors' published weights; their package is not needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Le
from safetensors.torch import load_file
from torch import Tensor

from alignkit import Example, Reward, Scores, check_ranges
from alignkit.errors import ConfigError
from alignkit_rewards import blip
from alignkit_rewards.checkpoints import (
    Precision,
    backbone_dtype,
    check_local,
    count,
    load_model,
    load_tokenizer,
    locate_file,
    tokenize,
    tokenizer_source,
)
from alignkit_rewards.linear import fold
from alignkit_rewards.pixels import CLIP_MEAN, CLIP_STD, normalize, resize_and_crop
from alignkit_rewards.published import Translated, converted

PUBLISHED = "THUDM/ImageReward/ImageReward.pt"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and standard deviation of the raw values over the authors' validation set; part of the published score."""


@dataclass
class ImageReward(Reward):
    """(raw - mean) / std of a BLIP ViT-L with a head; mostly in [-2, 2].

    Part "truncated": 1 if the prompt has more tokens than are read (`max_tokens`).
    """

    checkpoint: str = PUBLISHED
    """The published file, on disk or as owner/name/file on the hub, or a local folder that was converted from it."""
    tokenizer: str = ""
    """Hub id or local folder of BERT's tokenizer. Empty: that of the checkpoint's folder if there is one, or else
    google-bert/bert-base-uncased."""
    precision: Precision = "auto"
    """Precision of the backbone: auto is bf16 on CUDA and fp32 elsewhere. The head is always float32."""
    normalized: bool = True
    """Whether to subtract the mean and divide by the standard deviation, as the authors do. SDPO reports raw values."""
    max_tokens: Annotated[int, Ge(3), Le(512)] = 35
    """Tokens of the prompt that are read, including [CLS] and [SEP]; 35 as published."""

    differentiable: ClassVar[bool] = True
    name: ClassVar[str] = "image_reward"

    def __post_init__(self) -> None:
        check_ranges(self)
        self._model: Any = None
        self._tokenizer: Any = None

    def check(self, examples: Iterable[Example]) -> None:
        check_local(self.name, "checkpoint", self.checkpoint)
        check_local(self.name, "tokenizer", self.tokenizer)

    def load(self, device: torch.device) -> None:
        if self._model is None:
            from transformers import BlipForImageTextRetrieval

            file = locate_file(self.name, "checkpoint", self.checkpoint)
            folder = Path(self.checkpoint).expanduser()
            if file is not None:
                folder = converted(self.name, file, BlipForImageTextRetrieval, blip.large, translate, ("itm_head.",))
            if not (folder / "head.safetensors").is_file():
                raise ConfigError(
                    f"image_reward: the checkpoint {self.checkpoint!r} has no head.safetensors; expected "
                    "ImageReward.pt of https://huggingface.co/THUDM/ImageReward, or a folder converted from it; put "
                    f"that file on this disk and set reward.{self.name}.checkpoint to its path"
                )
            model = load_model(self.name, "checkpoint", str(folder), BlipForImageTextRetrieval, ("itm_head.",))
            head = load_file(folder / "head.safetensors")
            self._weight, self._bias = head["weight"], head["bias"]
            source = tokenizer_source(self.tokenizer, self.checkpoint, "google-bert/bert-base-uncased")
            self._tokenizer = load_tokenizer(self.name, source, model.config.text_config.vocab_size)
            self._model = model
        self._model.to(device, backbone_dtype(self.precision, device))
        self._weight, self._bias = self._weight.to(device), self._bias.to(device)

    def tokens(self, example: Example) -> tuple[int, int] | None:
        return self.max_tokens, count(self._tokenizer, example.text)

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Scores:
        size = self._model.config.vision_config.image_size
        pixels = normalize(resize_and_crop(images, size), CLIP_MEAN, CLIP_STD).to(self._model.dtype)
        image_features = self._model.vision_model(pixel_values=pixels).last_hidden_state
        tokens = tokenize(self._tokenizer, [example.text for example in examples], self.max_tokens, images.device)
        hidden = self._model.text_encoder(
            input_ids=tokens.ids, attention_mask=tokens.mask, encoder_hidden_states=image_features
        ).last_hidden_state
        values = hidden[:, 0].float() @ self._weight + self._bias
        if self.normalized:
            values = (values - MEAN) / STD
        return Scores(values, torch.ones_like(values, dtype=torch.bool), {"truncated": tokens.truncated})


def translate(state: Mapping[str, Tensor]) -> Translated:
    """Return the weights under BlipForImageTextRetrieval's names, and the head folded into weight and bias."""
    model: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for name, value in state.items():
        name = name.removeprefix("blip.")
        if name.startswith("mlp."):
            head[name.removeprefix("mlp.")] = value
        else:
            model[name] = value
    try:
        weight, bias = fold(head)
    except ValueError as error:
        raise ConfigError(
            f"image_reward: the head of the checkpoint (mlp.*) is not the published one: {error}"
        ) from error
    return blip.names(model), {"weight": weight, "bias": bias}
