"""VQAScore: a vision language model's probability that the image shows the prompt (Lin et al., 2404.01291).

The score is the probability that the answer to one question begins with "Yes". It supports decoder models, the Qwen-VL
family of transformers; the paper's own CLIP-FlanT5, which also counts the end of the answer, is not supported.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from alignkit import Example, Reward, check_ranges
from alignkit.errors import ConfigError
from alignkit_rewards.checkpoints import (
    Precision,
    backbone_dtype,
    check_local,
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
"""Mean, standard deviation and minimum number of pixels of each family's images, as in their processors."""


@dataclass
class VqaScore(Reward):
    """Probability of "Yes" as the first token of the answer, in [0, 1], relative to all tokens and not only to "No"."""

    checkpoint: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    """Hub id or local folder of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL, with its tokenizer and chat template."""
    question: str = 'Does this figure show "{}"? Please answer yes or no.'
    """The question; {} stands for the prompt. The default is the paper's wording, for every model."""
    answer: str = "Yes"
    """The answer whose probability is the score; a single token."""
    max_pixels: Annotated[int, Ge(56 * 56)] = 12_845_056
    """Larger images are shrunk to this many pixels; the published limit. Less needs less memory."""
    precision: Precision = "auto"
    """Precision of the network: auto is bf16 on CUDA and fp32 elsewhere. The last layer is always float32."""

    differentiable: ClassVar[bool] = True
    bounds: ClassVar[tuple[float | None, float | None]] = (0.0, 1.0)
    name: ClassVar[str] = "vqa_score"

    def __post_init__(self) -> None:
        check_ranges(self)
        if "{}" not in self.question:
            raise ConfigError(f"vqa_score: question is {self.question!r}, expected a text with {{}} for the prompt")
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
                raise ConfigError(
                    f"vqa_score: the tokenizer of {self.checkpoint!r} has no chat template; expected the checkpoint of "
                    "an instruction-tuned model"
                )
            ids = tokenizer(self.answer, add_special_tokens=False).input_ids
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
                raise ConfigError(
                    f"vqa_score: answer is {self.answer!r}, which is {len(ids)} tokens, expected 1 that the tokenizer "
                    "knows"
                )
            self._yes, self._model, self._tokenizer = ids[0], model, tokenizer
        self._model.to(device, dtype)

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        config = self._model.config
        mean, std, min_pixels = FAMILIES[config.model_type]
        vision = config.vision_config
        factor = vision.patch_size * vision.spatial_merge_size
        height, width = fitting_size(images.shape[-2], images.shape[-1], factor, min_pixels, self.max_pixels)
        pixels = normalize(resize(images, height, width), mean, std)
        patches = patchify(pixels, vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
        grid = torch.tensor([[1, height // vision.patch_size, width // vision.patch_size]], device=images.device)
        image_tokens = int(grid.prod()) // vision.spatial_merge_size**2
        ids, mask = self._tokenize([example.text for example in examples], image_tokens)
        ids, mask = ids.to(images.device), mask.to(images.device)
        last = self._model.model(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=patches.flatten(0, 1).to(self._model.dtype),
            image_grid_thw=grid.expand(len(images), -1),
            mm_token_type_ids=(ids == config.image_token_id).int(),
            use_cache=False,
        ).last_hidden_state[:, -1]
        # In float32, because bfloat16 resolves a logit of 20 in steps of 0.125. The vocabulary is split to save memory.
        vocabulary = self._model.lm_head.weight.split(1 << 14)
        logits = torch.cat([last.float() @ part.float().T for part in vocabulary], dim=-1)
        return logits.softmax(-1)[:, self._yes]

    def _tokenize(self, texts: Sequence[str], image_tokens: int) -> tuple[Tensor, Tensor]:
        """Return token ids and mask (N, L) of the questions, padded at the start, with `image_tokens` image tokens."""
        image = self._model.config.image_token_id
        chats = []
        for text in texts:
            content = [{"type": "image"}, {"type": "text", "text": self.question.replace("{}", text)}]
            chat = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            ids = self._tokenizer(chat, add_special_tokens=False, verbose=False).input_ids
            if ids.count(image) != 1:
                raise ConfigError(
                    f"vqa_score: the question about {text!r} has {ids.count(image)} places for an image, expected 1; "
                    "a prompt must not contain the model's special tokens"
                )
            place = ids.index(image)
            chats.append([*ids[:place], *[image] * image_tokens, *ids[place + 1 :]])
        length = max(map(len, chats))
        padding = self._tokenizer.pad_token_id or 0
        ids = torch.tensor([[padding] * (length - len(some)) + some for some in chats])
        mask = torch.tensor([[0] * (length - len(some)) + [1] * len(some) for some in chats])
        return ids, mask


def fitting_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return the multiples of `factor` nearest to the image's size within the limits of pixels (Qwen2-VL's rule)."""
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return h, w


def patchify(pixels: Tensor, patch: int, merge: int, frames: int) -> Tensor:
    """Cut images (N, 3, H, W) into flat patches (N, H W / patch², 3 frames patch²) in Qwen-VL's order.

    Patches of one `merge` by `merge` block are consecutive, and the image is repeated as `frames` equal frames.
    """
    rows, columns = (side // (patch * merge) for side in pixels.shape[-2:])
    x = pixels.reshape(len(pixels), 3, rows, merge, patch, columns, merge, patch).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x[:, :, :, :, :, :, None].expand(*(-1,) * 6, frames, -1, -1)
    return x.reshape(len(pixels), rows * columns * merge**2, 3 * frames * patch**2)
