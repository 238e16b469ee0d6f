"""Text rendering: compare the text that an OCR model reads in the image with the text that the prompt names.

The text rendering reward of Flow-GRPO (Liu et al., 2505.05470): one minus the edit distance between target text and
recognised text, relative to the length of the target. The OCR model is GOT-OCR2, which takes a whole image and needs no
package other than transformers; Flow-GRPO uses PaddleOCR.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from alignkit import Example, Reward, Scores, check_ranges
from alignkit.errors import ConfigError
from alignkit_rewards.checkpoints import (
    Precision,
    backbone_dtype,
    check_local,
    load_model,
    load_tokenizer,
    state_of,
)
from alignkit_rewards.pixels import CLIP_MEAN, CLIP_STD, normalize, resize

_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')
START, END, IMAGE_START, IMAGE_END = "<|im_start|>", "<|im_end|>", "<img>", "</img>"
BEFORE_IMAGE = (
    f"{START}system\nYou should follow the instructions carefully and explain your answers in detail.{END}"
    f"{START}user\n{IMAGE_START}"
)
AFTER_IMAGE = f"{IMAGE_END}\n OCR: {END}{START}assistant\n"
"""The request that the model was trained on, before and after the image."""
VERSION = 1
"""Increment with every change here that can change a score: the request, how images are resized, the distance."""
_SHRINKING = 4
"""The projector after the vision tower halves each side twice."""


@dataclass
class Ocr(Reward):
    """1 - min(edit distance, length) / length of the target text, in [0, 1]; 1 if the target occurs in the image.

    The target is "target" of the prompt's metadata, or else the first text in double quotes. Case and blanks are
    ignored. A prompt without a target cannot be scored. No gradient. Part: "found", 1 if the whole target was read.
    """

    checkpoint: str = "stepfun-ai/GOT-OCR-2.0-hf"
    """Hub id or local folder of a GotOcr2ForConditionalGeneration, with its tokenizer."""
    max_new_tokens: Annotated[int, Ge(1)] = 128
    """Tokens read per image; further text is not read."""
    precision: Precision = "auto"
    """Precision of the network: auto is bf16 on CUDA and fp32 elsewhere."""

    bounds: ClassVar[tuple[float | None, float | None]] = (0.0, 1.0)
    name: ClassVar[str] = "ocr"

    def __post_init__(self) -> None:
        check_ranges(self)
        self._model: Any = None

    def check(self, examples: Iterable[Example]) -> None:
        check_local(self.name, "checkpoint", self.checkpoint)
        for example in examples:
            if not target_text(example):
                raise ConfigError(
                    f"ocr: the prompt {example.text!r} asks for no text in the image; expected text in double quotes, "
                    'or "target" in its metadata; change the prompt or leave it out'
                )

    def fingerprint(self) -> str:
        return f"ocr {VERSION} {self.max_new_tokens} {state_of(self._model, self._tokenizer)}"

    def explain(self, example: Example) -> list[str]:
        target = target_text(example)
        return [f'does it say "{target}"?'] if target else []

    def load(self, device: torch.device) -> None:
        if self._model is None:
            from transformers import GotOcr2ForConditionalGeneration

            model = load_model(self.name, "checkpoint", self.checkpoint, GotOcr2ForConditionalGeneration)
            vocabulary = model.config.text_config.vocab_size
            words = load_tokenizer(self.name, self.checkpoint, vocabulary, field="checkpoint")
            self._before, self._after = (
                words(text, add_special_tokens=False).input_ids for text in (BEFORE_IMAGE, AFTER_IMAGE)
            )
            self._end = words.convert_tokens_to_ids(END)
            if self._end in (None, words.unk_token_id):
                raise ConfigError(
                    f"ocr: the tokenizer of {self.checkpoint!r} lacks {END}; expected the tokenizer of a GOT-OCR2"
                )
            known = model.generation_config.eos_token_id
            self._ends = [self._end, *(known if isinstance(known, list) else [] if known is None else [known])]
            self._model, self._tokenizer = model, words
        self._model.to(device, backbone_dtype(self.precision, device))

    def read(self, images: Tensor) -> list[str]:
        """Return the text in images (N, 3, H, W) in [0, 1], each resized to a square, by greedy decoding."""
        model, vision = self._model, self._model.config.vision_config
        pixels = normalize(resize(images, vision.image_size, vision.image_size), CLIP_MEAN, CLIP_STD)
        places = (vision.image_size // vision.patch_size // _SHRINKING) ** 2
        ids = [*self._before, *[model.config.image_token_id] * places, *self._after]
        tokens = torch.tensor([ids], device=images.device).expand(len(images), -1)
        generated = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values=pixels.to(model.dtype),
            num_beams=1,
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self._ends,
            pad_token_id=self._end,
        )
        return [self._tokenizer.decode(one[len(ids) :], skip_special_tokens=True).strip() for one in generated]

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Scores:
        found = self.read(images.detach())
        targets = [target_text(example) for example in examples]
        values = [similarity(target, text) for target, text in zip(targets, found, strict=True)]
        scores = torch.tensor(values, device=images.device)
        valid = torch.tensor([bool(target) for target in targets], device=images.device)
        return Scores(scores, valid, {"found": (scores == 1).float()})


def target_text(example: Example) -> str:
    """Return the target text, lower case without blanks: metadata "target", or the first text in double quotes."""
    target = example.metadata.get("target")
    if target is None:
        quoted = _QUOTED.search(example.text)
        target = (quoted[1] or quoted[2] or "") if quoted else ""
    if not isinstance(target, str):
        raise ConfigError(f"ocr: prompt {example.text!r}: metadata target is {target!r}, expected a string")
    return plain(target)


def plain(text: str) -> str:
    """Return the text in lower case, without blanks and line breaks."""
    return "".join(text.lower().split())


def similarity(target: str, text: str) -> float:
    """Return the similarity of `text` to `target` (see `target_text`), 0 to 1; 1 if `text` contains the target.

    0 for an empty target.
    """
    text = plain(text)
    if not target or target in text:
        return float(bool(target))
    return 1 - min(edit_distance(target, text), len(target)) / len(target)


def edit_distance(first: str, second: str) -> int:
    """Return the Levenshtein distance: the fewest insertions, deletions and replacements of a letter."""
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(diagonal + (letter != other), row[j] + 1, row[j - 1] + 1)
    return row[-1]
