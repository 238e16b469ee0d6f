"""Text alignment: caption the image and compare the caption with the prompt.

The text alignment score of LaSRO ("Reward fine-tuning two-step diffusion models via learning differentiable
latent-space surrogate reward"): Florence-2 writes a detailed caption, and BERTScore compares it with the prompt. The
paper names neither the captioner's task nor BERTScore's language model; both are our choice. DDPO (Black et al.,
2305.13301) did the same with LLaVA.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from alignkit import Example, Reward, Scores, check_ranges
from alignkit_rewards.bertscore import Comparison, Measure
from alignkit_rewards.checkpoints import (
    Precision,
    backbone_dtype,
    check_local,
    load_model,
    load_tokenizer,
    state_of,
)
from alignkit_rewards.pixels import IMAGENET_MEAN, IMAGENET_STD, normalize, resize

Task = Literal["caption", "detailed_caption", "more_detailed_caption"]
REQUESTS: dict[Task, str] = {
    "caption": "What does the image describe?",
    "detailed_caption": "Describe in detail what is shown in the image.",
    "more_detailed_caption": "Describe with a paragraph what is shown in the image.",
}
"""The requests that Florence-2 was trained on."""
VERSION = 1
"""Increment with every change here that can change a score: the request, how images are resized, the comparison."""


@dataclass
class TextAlignment(Reward):
    """BERTScore of the image's caption against the prompt, at most 1. No gradient.

    Parts: "precision" and "recall", without the rescaling by `baseline`, and "truncated", 1 if the prompt has more
    tokens than are read. An empty caption scores as if nothing matched; an empty prompt cannot be scored.
    """

    captioner: str = "florence-community/Florence-2-large"
    """Hub id or local folder of a Florence2ForConditionalGeneration, with its tokenizer."""
    task: Task = "detailed_caption"
    """Level of detail of the caption."""
    resolution: Annotated[int, Ge(1)] = 768
    """Side in pixels of the square image given to the captioner; 768 as in its training. Less is faster."""
    num_beams: Annotated[int, Ge(1)] = 3
    """Beams of the beam search; 1 is greedy decoding and fastest."""
    max_new_tokens: Annotated[int, Ge(1)] = 256
    """Maximum number of tokens of a caption."""
    encoder: str = "FacebookAI/roberta-large"
    """Hub id or local folder of BERTScore's language model: RoBERTa, BERT or DeBERTa."""
    layer: Annotated[int, Ge(1)] = 17
    """Layer whose output is compared; 17 is BERTScore's choice for roberta-large."""
    measure: Measure = "f1"
    """f1, precision (is the content of the caption in the prompt?) or recall (the reverse; DDPO)."""
    reference: str = "{}"
    """Text that the caption is compared with; {} stands for the prompt. DDPO: "The image contains {}"."""
    baseline: Annotated[float, Lt(1)] = 0.0
    """b of (score - b) / (1 - b), which spreads the values; BERTScore's is 0.83122575 for the f1 of roberta-large."""
    precision: Precision = "auto"
    """Precision of both networks: auto is bf16 on CUDA and fp32 elsewhere. Tokens are compared in float32."""

    bounds: ClassVar[tuple[float | None, float | None]] = (None, 1.0)
    name: ClassVar[str] = "text_alignment"

    def __post_init__(self) -> None:
        check_ranges(self)
        self._comparison = Comparison(
            self.name, self.encoder, self.layer, self.measure, self.reference, self.baseline, self.precision
        )
        self._model: Any = None

    def check(self, examples: Iterable[Example]) -> None:
        check_local(self.name, "captioner", self.captioner)
        self._comparison.check(examples)

    def fingerprint(self) -> str:
        network = state_of(self._model, self._tokenizer)
        captioning = f"{self.task} {self.resolution} {self.num_beams} {self.max_new_tokens} {network}"
        return f"text_alignment {VERSION} {captioning} {self._comparison.fingerprint()}"

    def tokens(self, example: Example) -> tuple[int, int] | None:
        return self._comparison.tokens(example)

    def load(self, device: torch.device) -> None:
        if self._model is None:
            from transformers import Florence2ForConditionalGeneration

            model = load_model(self.name, "captioner", self.captioner, Florence2ForConditionalGeneration)
            self._tokenizer = load_tokenizer(
                self.name, self.captioner, model.config.text_config.vocab_size, field="captioner"
            )
            self._model = model
        self._model.to(device, backbone_dtype(self.precision, device))
        self._comparison.load(device)

    def captions(self, images: Tensor) -> list[str]:
        """Return captions of images (N, 3, H, W) in [0, 1], by deterministic beam search or greedy decoding."""
        model, words = self._model, self._tokenizer
        pixels = normalize(resize(images, self.resolution, self.resolution), IMAGENET_MEAN, IMAGENET_STD)
        side = -(-self.resolution // prod(model.config.vision_config.patch_stride))
        request = words(REQUESTS[self.task], add_special_tokens=False).input_ids
        # One token for each position of the feature map and one for their mean.
        ids = [*[model.config.image_token_id] * (side**2 + 1), words.bos_token_id, *request, words.eos_token_id]
        tokens = torch.tensor([ids], device=images.device).expand(len(images), -1)
        generated = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values=pixels.to(model.dtype),
            num_beams=self.num_beams,
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
        )
        return [words.decode(one, skip_special_tokens=True).strip() for one in generated]

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Scores:
        return self._comparison(self.captions(images.detach()), examples)
