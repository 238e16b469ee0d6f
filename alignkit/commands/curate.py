"""Reduce a set of prompts: drop repeated ones, and those too close to a kept one in a text embedding.

This is how LaSRO selects prompts ("Reward fine-tuning two-step diffusion models via learning differentiable
latent-space surrogate reward"); the encoder, the distance and the order are ours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit

from alignkit.commands.lint import same
from alignkit.config.bundles import find_bundle
from alignkit.errors import ConfigError
from alignkit.models.quiet import no_progress_bars
from alignkit.records import Example

Search = Literal["auto", "faiss", "torch"]
BLOCK = 256
"""Number of prompts that are embedded and looked up together."""


@dataclass(frozen=True)
class Dropped:
    """A prompt that was left out."""

    prompt: str
    near: str
    """The kept prompt that it repeats or is too close to."""
    distance: float
    """1 - cosine; 0 for a repetition."""
    repeated: bool
    """Whether it has the same text as an earlier one."""


def curate(
    examples: Sequence[Example],
    embed: Callable[[Sequence[str]], Tensor],
    distance: float = 0.1,
    limit: int | None = None,
    search: str = "auto",
) -> tuple[list[Example], list[Dropped]]:
    """Return the examples to keep, in their order, and those dropped until `limit` was reached.

    `embed` maps texts to unit vectors (N, D). An example is kept if no earlier example has its text (up to case, blanks
    and full stops at the end), and if its distance to every kept one, 1 - cosine, is more than `distance`.
    """
    check(distance, search)
    first: dict[str, str] = {}
    kept: list[Example] = []
    vectors: list[Tensor] = []
    dropped: list[Dropped] = []
    index: Index | None = None
    for start in range(0, len(examples), BLOCK):
        block = examples[start : start + BLOCK]
        found = embed([example.text for example in block]).cpu().float()
        index = index or open_index(search, found.shape[1])
        before = len(kept)
        nearest = index.nearest(found) if before else []
        for row, (example, vector) in enumerate(zip(block, found, strict=True)):
            if (known := same(example.text)) in first:
                dropped.append(Dropped(example.text, first[known], 0.0, True))
                continue
            places = [nearest[row]] if before else []
            if fresh := vectors[before:]:  # kept from this block, and not in the index yet
                places.append(before + int((torch.stack(fresh) @ vector).argmax()))
            gap, place = min(((_gap(vectors[place], vector), place) for place in places), default=(2.0, -1))
            first[known] = example.text if gap > distance else kept[place].text
            if gap <= distance:
                dropped.append(Dropped(example.text, kept[place].text, gap, False))
                continue
            kept.append(example)
            vectors.append(vector)
            if len(kept) == limit:
                return kept, dropped
        if fresh := vectors[before:]:
            index.add(torch.stack(fresh))
    return kept, dropped


def check(distance: float, search: str) -> None:
    """Raise ConfigError for values that `curate` cannot work with."""
    if not 0 <= distance < 2:
        raise ConfigError(f"distance: found {distance}, expected 0 or more and less than 2")
    if search not in get_args(Search):
        raise ConfigError(f"search: found {search!r}, expected one of {', '.join(get_args(Search))}")
    open_index(search, 1)


def _gap(first: Tensor, second: Tensor) -> float:
    """Return 1 - cosine in float64, so that it does not depend on the search."""
    return max(0.0, 1 - float(first.double() @ second.double()))


class Index(ABC):
    """Exact search for the nearest of a set of unit vectors."""

    @abstractmethod
    def add(self, vectors: Tensor) -> None:
        """Add `vectors` (M, D) float32."""

    @abstractmethod
    def nearest(self, vectors: Tensor) -> list[int]:
        """Return, for each of `vectors` (N, D), the index of the added vector with the largest cosine."""


class TorchIndex(Index):
    """Search with torch, one added block at a time."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    def add(self, vectors: Tensor) -> None:
        self._blocks.append(vectors)

    def nearest(self, vectors: Tensor) -> list[int]:
        start, best, places = 0, torch.full((len(vectors),), -torch.inf), torch.zeros(len(vectors), dtype=torch.long)
        for block in self._blocks:
            value, place = (vectors @ block.T).max(1)
            places = torch.where(value > best, place + start, places)
            best, start = torch.maximum(best, value), start + len(block)
        return places.tolist()


class FaissIndex(Index):
    """Search with FAISS: the same result, faster for many vectors."""

    def __init__(self, width: int) -> None:
        from faiss import IndexFlatIP

        self._index = IndexFlatIP(width)

    def add(self, vectors: Tensor) -> None:
        self._index.add(vectors.contiguous().numpy())

    def nearest(self, vectors: Tensor) -> list[int]:
        _, places = self._index.search(vectors.contiguous().numpy(), 1)
        return [int(place) for place in places[:, 0]]


def open_index(search: str, width: int) -> Index:
    """Return an empty index. "auto" takes FAISS if it is installed; "faiss" raises ConfigError if it is not."""
    if search == "torch":
        return TorchIndex()
    try:
        return FaissIndex(width)
    except ImportError:
        if search == "faiss":
            raise ConfigError("search: faiss is not installed; pip install 'alignkit[faiss]', or use torch") from None
        return TorchIndex()


class TextEmbedding:
    """A frozen text encoder of transformers on the CPU, which maps texts to unit vectors."""

    def __init__(self, encoder: str = "", model: str = "") -> None:
        """Load `encoder`, a hub id or a folder; if empty, the text encoder of the diffusion pipeline `model`.

        Raises ConfigError if it cannot be loaded.
        """
        from transformers import AutoModel, AutoTokenizer

        source = encoder or find_bundle(model).path
        inner = ({}, {}) if encoder else ({"subfolder": "text_encoder"}, {"subfolder": "tokenizer"})
        # Without the argument, transformers asks on the terminal whether to run code that comes with a checkpoint.
        code = {"trust_remote_code": False}
        wanted = "expected a hub id or a folder of a CLIP, BERT, T5 or sentence encoder with its tokenizer"
        try:
            with no_progress_bars():
                network, report = AutoModel.from_pretrained(
                    source, dtype=torch.float32, output_loading_info=True, **code, **inner[0]
                )
                self._words: Any = AutoTokenizer.from_pretrained(source, **code, **inner[1])
            config = network.config
            most = getattr(getattr(config, "text_config", config), "max_position_embeddings", 512)
            self._limit = min(self._words.model_max_length, most)
            self._pooled = config.model_type.startswith("clip")
            self._read: Any = network.eval().requires_grad_(False)
            if config.model_type == "clip":
                self._read = network.get_text_features
            elif config.is_encoder_decoder:
                self._read = network.get_encoder()
            self.truncated = 0
            self(["a text"])
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
            raise ConfigError(f"encoder: {source!r} cannot be used: {reason}; {wanted}") from error
        unused = ("pooler.", "decoder.") if config.is_encoder_decoder else ("pooler.",)
        if missing := [name for name in report["missing_keys"] if not name.startswith(unused)]:
            raise ConfigError(f"encoder: {source!r} lacks {missing[0]} and {len(missing) - 1} more; {wanted}")

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (N, D) float32: CLIP's projection of the last token, else the mean over the tokens.

        Texts that are longer than the encoder's limit are counted in `truncated`.
        """
        self.truncated += sum(len(ids) > self._limit for ids in self._words(list(texts), verbose=False).input_ids)
        tokens = self._words(list(texts), padding=True, truncation=True, max_length=self._limit, return_tensors="pt")
        mask = tokens.attention_mask
        output = self._read(input_ids=tokens.input_ids, attention_mask=mask)
        if self._pooled:
            return unit(output.pooler_output, dim=-1)
        weights = mask[:, :, None].float()
        return unit((output.last_hidden_state * weights).sum(1) / weights.sum(1), dim=-1)
