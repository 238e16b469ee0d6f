"""VQAScore: how sure is a vision language model that the image shows the prompt? (Lin et al., 2404.01291).

The probability that the answer to one question begins with "Yes". For decoder models, the Qwen-VL family of
transformers; the paper's own CLIP-FlanT5, which also counts the end of the answer, is not among them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.interfaces import Reward
from alignkit.records import Example
from alignkit_rewards.checkpoints import (
    Precision,
    backbone_dtype,
    check_local,
    check_precision,
    load_model,
    load_tokenizer,
)
from alignkit_rewards.pixels import CLIP_MEAN, CLIP_STD, normalize, resize

_HALF = (0.5, 0.5, 0.5)
FAMILIES = {
    "qwen2_vl": (CLIP_MEAN, CLIP_STD, 56 * 56),
    "qwen2_5_vl": (CLIP_MEAN, CLIP_STD, 56 * 56),
    "qwen3_vl": (_HALF, _HALF, 256 * 256),
}
"""Mean, deviation and the fewest pixels of each family's images, as their processors have it."""


@dataclass
class VqaScore(Reward):
    """The probability of "Yes" as the first token of the answer, in [0, 1], among all tokens and not against "No"
    alone."""

    checkpoint: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    """Hub id or local folder of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL, with its tokenizer and chat template."""
    question: str = 'Does this figure show "{}"? Please answer yes or no.'
    """What is asked; {} stands for the prompt. The paper's wording, whichever the model."""
    answer: str = "Yes"
    """The answer whose probability counts; one token."""
    max_pixels: int = 12_845_056
    """Larger images are made smaller before they are shown; as published. Less takes less memory."""
    precision: Precision = "auto"
    """The network's precision: auto is bf16 on CUDA and fp32 elsewhere. The last layer is always float32."""

    differentiable: ClassVar[bool] = True
    bounds: ClassVar[tuple[float | None, float | None]] = (0.0, 1.0)
    name: ClassVar[str] = "vqa_score"

    def __post_init__(self) -> None:
        check_precision(self.name, self.precision)
        if "{}" not in self.question:
            raise ConfigError(f"vqa_score: question is {self.question!r}, expected a text with {{}} for the prompt")
        if self.max_pixels < 56 * 56:
            raise ConfigError(f"vqa_score: max_pixels is {self.max_pixels}, expected {56 * 56} or more")
        self._model: Any = None
        self._tokenizer: Any = None

    def check(self, examples: Iterable[Example]) -> None:
        check_local(self.name, "checkpoint", self.checkpoint)

    def explain(self, example: Example) -> list[str]:
        return [self.question.replace("{}", example.text)]

    def load(self, device: torch.device) -> None:
        dtype = backbone_dtype(self.precision, device)
        if self._model is None:
            from transformers import AutoModelForImageTextToText

            model = load_model(self.name, "checkpoint", self.checkpoint, AutoModelForImageTextToText, dtype=dtype)
            family = model.config.model_type
            if family not in FAMILIES:
                raise ConfigError(
                    f"vqa_score: the checkpoint {self.checkpoint!r} is a {family} model, expected one of "
                    f"{', '.join(FAMILIES)}"
                )
            vocabulary = model.config.text_config.vocab_size
            tokenizer = load_tokenizer(self.name, self.checkpoint, vocabulary, field="checkpoint")
            if not tokenizer.chat_template:
                raise ConfigError(f"vqa_score: the tokenizer of {self.checkpoint!r} has no chat template")
            ids = tokenizer(self.answer, add_special_tokens=False).input_ids
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
                raise ConfigError(f"vqa_score: answer is {self.answer!r}, which is {len(ids)} tokens, expected 1")
            self._yes, self._model, self._tokenizer = ids[0], model, tokenizer
        self._model.to(device, dtype)

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        config = self._model.config
        mean, std, fewest = FAMILIES[config.model_type]
        vision = config.vision_config
        factor = vision.patch_size * vision.spatial_merge_size
        height, width = fitting_size(images.shape[-2], images.shape[-1], factor, fewest, self.max_pixels)
        pixels = normalize(resize(images, height, width), mean, std)
        patches = patchify(pixels, vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
        grid = torch.tensor([[1, height // vision.patch_size, width // vision.patch_size]], device=images.device)
        ids, mask = self._ask([example.text for example in examples], int(grid.prod()) // vision.spatial_merge_size**2)
        ids, mask = ids.to(images.device), mask.to(images.device)
        last = self._model.model(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=patches.flatten(0, 1).to(self._model.dtype),
            image_grid_thw=grid.expand(len(images), -1),
            mm_token_type_ids=(ids == config.image_token_id).int(),
            use_cache=False,
        ).last_hidden_state[:, -1]
        # In float32, a part of the vocabulary at a time: in bfloat16 a logit of 20 knows steps of 0.125.
        vocabulary = self._model.lm_head.weight.split(1 << 14)
        logits = torch.cat([last.float() @ part.float().T for part in vocabulary], dim=-1)
        return logits.softmax(-1)[:, self._yes]

    def _ask(self, texts: Sequence[str], tokens: int) -> tuple[Tensor, Tensor]:
        """Token ids and mask (N, L) of the questions, padded in front, with room for `tokens` of the image each."""
        image = self._model.config.image_token_id
        asked = []
        for text in texts:
            content = [{"type": "image"}, {"type": "text", "text": self.question.replace("{}", text)}]
            chat = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            ids = self._tokenizer(chat, add_special_tokens=False, verbose=False).input_ids
            if ids.count(image) != 1:
                raise ConfigError(
                    f"vqa_score: the question about {text!r} has {ids.count(image)} places for an image, expected 1; "
                    "a prompt must not hold the model's own tokens"
                )
            place = ids.index(image)
            asked.append([*ids[:place], *[image] * tokens, *ids[place + 1 :]])
        length = max(map(len, asked))
        padding = self._tokenizer.pad_token_id or 0
        ids = torch.tensor([[padding] * (length - len(some)) + some for some in asked])
        mask = torch.tensor([[0] * (length - len(some)) + [1] * len(some) for some in asked])
        return ids, mask


def fitting_size(height: int, width: int, factor: int, fewest: int, most: int) -> tuple[int, int]:
    """Multiples of `factor` nearest to the image's size, of `fewest` to `most` pixels (Qwen2-VL's rule)."""
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > most:
        shrink = math.sqrt(height * width / most)
        h, w = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif h * w < fewest:
        grow = math.sqrt(fewest / (height * width))
        h, w = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return h, w


def patchify(pixels: Tensor, patch: int, merge: int, frames: int) -> Tensor:
    """(N, 3, H, W) to rows of patches (N, H W / patch², 3 frames patch²) in Qwen-VL's order: `merge` by `merge`
    neighbours stand together, and the image counts as `frames` equal frames."""
    rows, columns = (side // (patch * merge) for side in pixels.shape[-2:])
    x = pixels.reshape(len(pixels), 3, rows, merge, patch, columns, merge, patch).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x[:, :, :, :, :, :, None].expand(*(-1,) * 6, frames, -1, -1)
    return x.reshape(len(pixels), rows * columns * merge**2, 3 * frames * patch**2)
