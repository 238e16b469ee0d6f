"""BERTScore: similarity of two texts, token by token, in a language model's embedding space (Zhang et al., 1904.09675).

Each token of one text is matched with the most similar token of the other; precision is the mean over the candidate's
tokens, recall over the reference's. Tokens are not weighted by inverse document frequency, which is also the default
of the authors' program.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit

from alignkit import Example, Scores
from alignkit.errors import ConfigError
from alignkit_rewards.checkpoints import (
    Precision,
    backbone_dtype,
    check_local,
    count,
    load_model,
    load_tokenizer,
    state_of,
    tokenize,
)

Measure = Literal["f1", "precision", "recall"]


@dataclass(frozen=True)
class Embedded:
    """N texts as unit vectors, one per token."""

    vectors: Tensor
    """(N, L, D) float32."""
    matchable: Tensor
    """(N, L) bool: not padding. The start and end tokens can be matched, but do not count in the means."""
    counted: Tensor
    """(N, L) bool: a token of the text itself."""
    truncated: Tensor
    """(N,) float32: 1 where the text was too long and its end was cut off."""

    def select(self, index: Tensor) -> Embedded:
        """Return the texts at `index` (M,), in that order."""
        return replace(self, **{name: value[index] for name, value in vars(self).items()})


class TextEncoder:
    """The first layers of an encoder of transformers (RoBERTa, BERT, DeBERTa), frozen, with its tokenizer."""

    def __init__(self, reward: str, field: str, source: str, layer: int) -> None:
        """Load the encoder up to `layer`, counted from 1, whose output is compared; later layers are dropped.

        Raises ConfigError for a model of another kind, and for a layer that the model does not have.
        """
        from transformers import AutoModel

        # Checkpoints of masked language models have no pooler, and none is needed.
        model = load_model(reward, field, source, AutoModel, ("pooler.",))
        layers = getattr(getattr(model, "encoder", None), "layer", None)
        if layers is None:
            raise ConfigError(
                f"{reward}: the {field} {source!r} is a {model.config.model_type} model, expected an encoder with "
                "a list of layers, such as RoBERTa, BERT or DeBERTa"
            )
        if layer > len(layers):
            raise ConfigError(f"{reward}: layer is {layer}, but the {field} {source!r} has {len(layers)} layers")
        model.encoder.layer = layers[:layer]
        if hasattr(model, "pooler"):
            model.pooler = None  # randomly initialised if the checkpoint has none, so fingerprints would never match
        self.model = model
        self.tokenizer = load_tokenizer(reward, source, model.config.vocab_size, field)
        # RoBERTa counts positions from its padding token's id + 1.
        roberta = model.config.model_type == "roberta"
        self.limit = model.config.max_position_embeddings - (model.config.pad_token_id + 1 if roberta else 0)
        # RoBERTa's tokens include the blank before a word; a leading blank makes the first word like the others.
        self._prefix = " " if roberta else ""

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the network to `device` and `dtype`."""
        self.model.to(device, dtype)

    def count(self, text: str) -> int:
        """Return the number of tokens of a text, including the start and end tokens."""
        return count(self.tokenizer, self._prepared(text))

    def _prepared(self, text: str) -> str:
        return self._prefix + text.strip() if text.strip() else ""

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Embedded:
        """Embed N texts; each distinct one is encoded once."""
        texts = [self._prepared(text) for text in texts]
        distinct = list(dict.fromkeys(texts))
        tokens = tokenize(self.tokenizer, distinct, self.limit, self.model.device)
        hidden = self.model(input_ids=tokens.ids, attention_mask=tokens.mask).last_hidden_state
        matchable = tokens.mask.bool()
        positions = torch.arange(matchable.shape[1], device=matchable.device)
        counted = matchable & (positions > 0) & (positions < matchable.sum(1, keepdim=True) - 1)
        found = Embedded(unit(hidden.float(), dim=-1), matchable, counted, tokens.truncated)
        return found.select(torch.tensor([distinct.index(text) for text in texts], device=matchable.device))


def bertscore(candidate: Embedded, reference: Embedded) -> tuple[Tensor, Tensor, Tensor]:
    """Return precision, recall and F1 (N,) float32 of N candidates, each against its reference; 0 if either is empty.

    F1 is also 0 unless precision and recall are both above 0: the harmonic mean is undefined there.
    """
    cosine = candidate.vectors @ reference.vectors.transpose(1, 2)
    padding = ~(candidate.matchable[:, :, None] & reference.matchable[:, None, :])
    cosine = cosine.masked_fill(padding, -torch.inf)
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
    """BERTScore of captions against prompts, set up from the fields of a reward, whose ranges the reward checks.

    Raises ConfigError for other bad values.
    """

    def __init__(
        self, reward: str, encoder: str, layer: int, measure: str, reference: str, baseline: float, precision: Precision
    ) -> None:
        if "{}" not in reference:
            raise ConfigError(f"{reward}: reference is {reference!r}, expected a text with {{}} for the prompt")
        self.reward, self.source, self.layer, self.measure = reward, encoder, layer, measure
        self.reference, self.baseline, self.precision = reference, baseline, precision
        self._encoder: TextEncoder | None = None

    def check(self, examples: Iterable[Example]) -> None:
        """Raise ConfigError for a missing folder, and for a prompt without words."""
        check_local(self.reward, "encoder", self.source)
        for example in examples:
            if not example.text.strip():
                raise ConfigError(f"{self.reward}: the prompt {example.text!r} has no word to compare a caption with")

    def load(self, device: torch.device) -> None:
        """Load the encoder, or move it to `device` if it is loaded."""
        if self._encoder is None:
            self._encoder = TextEncoder(self.reward, "encoder", self.source, self.layer)
        self._encoder.to(device, backbone_dtype(self.precision, device))

    def tokens(self, example: Example) -> tuple[int, int]:
        """Return the encoder's limit of tokens, and the number of tokens of the prompt."""
        assert self._encoder is not None
        return self._encoder.limit, self._encoder.count(self.reference.replace("{}", example.text))

    def fingerprint(self) -> str:
        """Return a string that changes whenever scores could change. Requires `load`."""
        assert self._encoder is not None
        network = state_of(self._encoder.model, self._encoder.tokenizer)
        return f"{self.layer} {self.measure} {self.reference!r} {self.baseline} {network}"

    def __call__(self, captions: Sequence[str], examples: Sequence[Example]) -> Scores:
        """Score N captions; parts: "precision" and "recall", both without the baseline rescaling, and "truncated"."""
        assert self._encoder is not None
        prompts = self._encoder([self.reference.replace("{}", example.text) for example in examples])
        precision, recall, f1 = bertscore(self._encoder(captions), prompts)
        values = {"f1": f1, "precision": precision, "recall": recall}[self.measure]
        values = (values - self.baseline) / (1 - self.baseline)
        valid = torch.tensor([bool(example.text.strip()) for example in examples], device=values.device)
        return Scores(values, valid, {"precision": precision, "recall": recall, "truncated": prompts.truncated})
