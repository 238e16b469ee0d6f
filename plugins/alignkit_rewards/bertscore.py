"""BERTScore: how alike two texts are, token by token, in the eyes of a language model (Zhang et al., 1904.09675).

Each token of one text is matched with the most similar one of the other; precision is the mean over the candidate's
tokens, recall over the reference's. Without the weighting by inverse document frequency, as is the default of the
authors' program.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit

from alignkit.errors import ConfigError
from alignkit.records import Example, Scores
from alignkit_rewards.checkpoints import (
    Precision,
    backbone_dtype,
    check_local,
    check_precision,
    count,
    load_model,
    load_tokenizer,
    state_of,
    tokenize,
)

Measure = Literal["f1", "precision", "recall"]


@dataclass(frozen=True)
class Embedded:
    """Texts as unit vectors, one a token."""

    vectors: Tensor
    """(N, L, D) float32."""
    there: Tensor
    """(N, L) bool: a token stands here. The first and the last of each text can be matched, but are not counted."""
    counted: Tensor
    """(N, L) bool: a token of the text itself."""
    truncated: Tensor
    """(N,) float32: 1 where the text was too long and its end was not read."""

    def select(self, index: Tensor) -> Embedded:
        """The texts at `index` (M,), in that order."""
        return replace(self, **{name: value[index] for name, value in vars(self).items()})


class TextEncoder:
    """The first layers of an encoder of transformers (RoBERTa, BERT, DeBERTa), frozen, with its tokenizer."""

    def __init__(self, reward: str, field: str, source: str, layer: int) -> None:
        """`layer` is the one whose output is compared, 1 the first; those behind it are thrown away.

        Raises ConfigError for what is no such encoder, and for a layer that it has not.
        """
        from transformers import AutoModel

        # Checkpoints of masked language models come without a pooler, and it is not used.
        model = load_model(reward, field, source, AutoModel, ("pooler.",))
        layers = getattr(getattr(model, "encoder", None), "layer", None)
        if layers is None:
            raise ConfigError(
                f"{reward}: the {field} {source!r} is a {model.config.model_type} model, expected an encoder with "
                "layers in a row, as RoBERTa, BERT or DeBERTa"
            )
        if layer > len(layers):
            raise ConfigError(f"{reward}: layer is {layer}, and the {field} {source!r} has {len(layers)}")
        model.encoder.layer = layers[:layer]
        if hasattr(model, "pooler"):
            model.pooler = None  # drawn at random where the checkpoint has none, which no fingerprint would find again
        self.model = model
        self.tokenizer = load_tokenizer(reward, source, model.config.vocab_size, field)
        # RoBERTa counts positions from its padding token's id + 1.
        roberta = model.config.model_type == "roberta"
        self.limit = model.config.max_position_embeddings - (model.config.pad_token_id + 1 if roberta else 0)
        # Its tokens tell whether a blank stands before the word; a text's first word is like the others.
        self._before = " " if roberta else ""

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the network there."""
        self.model.to(device, dtype)

    def count(self, text: str) -> int:
        """Tokens of a text, both marks counted."""
        return count(self.tokenizer, self._as_read(text))

    def _as_read(self, text: str) -> str:
        return self._before + text.strip() if text.strip() else ""

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Embedded:
        """N texts, each distinct one read once."""
        texts = [self._as_read(text) for text in texts]
        distinct = list(dict.fromkeys(texts))
        tokens = tokenize(self.tokenizer, distinct, self.limit, self.model.device)
        read = self.model(input_ids=tokens.ids, attention_mask=tokens.mask).last_hidden_state
        there = tokens.mask.bool()
        places = torch.arange(there.shape[1], device=there.device)
        counted = there & (places > 0) & (places < there.sum(1, keepdim=True) - 1)
        found = Embedded(unit(read.float(), dim=-1), there, counted, tokens.truncated)
        return found.select(torch.tensor([distinct.index(text) for text in texts], device=there.device))


def bertscore(candidate: Embedded, reference: Embedded) -> tuple[Tensor, Tensor, Tensor]:
    """Precision, recall and F1 (N,) float32 of N candidates, each against its reference; 0 where either is empty.

    F1 is 0 as well where precision and recall are not both above 0, where the harmonic mean has no meaning.
    """
    cosine = candidate.vectors @ reference.vectors.transpose(1, 2)
    absent = ~(candidate.there[:, :, None] & reference.there[:, None, :])
    cosine = cosine.masked_fill(absent, -torch.inf)
    empty = ~(candidate.counted.any(1) & reference.counted.any(1))

    def mean(best: Tensor, counted: Tensor) -> Tensor:
        total = best.masked_fill(~counted, 0).sum(1) / counted.sum(1).clamp(min=1)
        return total.masked_fill(empty, 0)

    precision = mean(cosine.amax(2), candidate.counted)
    recall = mean(cosine.amax(1), reference.counted)
    both = (precision > 0) & (recall > 0)
    f1 = 2 * precision * recall / torch.where(both, precision + recall, 1.0)
    return precision, recall, f1.masked_fill(~both, 0)


class Comparison:
    """Captions against prompts, as the fields of a reward say. Raises ConfigError for fields that cannot work."""

    def __init__(
        self, reward: str, encoder: str, layer: int, measure: str, reference: str, baseline: float, precision: Precision
    ) -> None:
        check_precision(reward, precision)
        if measure not in get_args(Measure):
            raise ConfigError(f"{reward}: measure is {measure!r}, expected one of {', '.join(get_args(Measure))}")
        if layer < 1:
            raise ConfigError(f"{reward}: layer is {layer}, expected 1 or more")
        if "{}" not in reference:
            raise ConfigError(f"{reward}: reference is {reference!r}, expected a text with {{}} for the prompt")
        if not baseline < 1:
            raise ConfigError(f"{reward}: baseline is {baseline}, expected less than 1")
        self.reward, self.source, self.layer, self.measure = reward, encoder, layer, measure
        self.reference, self.baseline, self.precision = reference, baseline, precision
        self._encoder: TextEncoder | None = None

    def check(self, examples: Iterable[Example]) -> None:
        """Raise ConfigError for a folder that is not there, and for a prompt that nothing can be compared with."""
        check_local(self.reward, "encoder", self.source)
        for example in examples:
            if not example.text.strip():
                raise ConfigError(f"{self.reward}: the prompt {example.text!r} has no word to compare a caption with")

    def load(self, device: torch.device) -> None:
        """Load the encoder, or move it."""
        if self._encoder is None:
            self._encoder = TextEncoder(self.reward, "encoder", self.source, self.layer)
        self._encoder.to(device, backbone_dtype(self.precision, device))

    def tokens(self, example: Example) -> tuple[int, int]:
        """Tokens of a prompt that are read at most, and those that it has."""
        assert self._encoder is not None
        return self._encoder.limit, self._encoder.count(self.reference.replace("{}", example.text))

    def fingerprint(self) -> str:
        """What tells this comparison from others, once it is loaded."""
        assert self._encoder is not None
        network = state_of(self._encoder.model, self._encoder.tokenizer)
        return f"{self.layer} {self.measure} {self.reference!r} {self.baseline} {network}"

    def __call__(self, captions: Sequence[str], examples: Sequence[Example]) -> Scores:
        """Of N captions, with the parts "precision" and "recall", not rescaled, and "truncated"."""
        assert self._encoder is not None
        prompts = self._encoder([self.reference.replace("{}", example.text) for example in examples])
        precision, recall, f1 = bertscore(self._encoder(captions), prompts)
        values = {"f1": f1, "precision": precision, "recall": recall}[self.measure]
        values = (values - self.baseline) / (1 - self.baseline)
        valid = torch.tensor([bool(example.text.strip()) for example in examples], device=values.device)
        return Scores(values, valid, {"precision": precision, "recall": recall, "truncated": prompts.truncated})
