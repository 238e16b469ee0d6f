"""Plain records that pass between the core and its plugins.

Letters in shapes: N rows, K sampler steps, S = (C, h, w) one latent, L tokens, D text features, P distinct texts,
(H, W) pixels. This module imports torch for annotations only, so that listing plugins stays quick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """A frozen table: every field is a column, and all columns share their first axis.

    A column is a tensor (N, ...), another `Rows` of length N (a `Prompt`, say), or None where it is not used.
    """

    def __len__(self) -> int:
        return len(next(getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None))

    def _map(self, function: Any) -> Self:
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(column) for name, column in columns.items() if column is not None})

    def select(self, index: Tensor) -> Self:
        """The rows at `index` (M,), in that order."""
        return self._map(lambda c: c.select(index) if isinstance(c, Rows) else c[index.to(c.device)])

    def to(self, device: torch.device | str) -> Self:
        """All columns on `device`."""
        return self._map(lambda c: c.to(device))

    def split(self, size: int) -> Iterator[Self]:
        """Consecutive parts of at most `size` rows."""
        import torch

        for start in range(0, len(self), size):
            yield self.select(torch.arange(start, min(start + size, len(self))))

    def even_split(self, size: int) -> Iterator[Self]:
        """Consecutive parts of nearly `size` rows, so that no update rests on a small remainder."""
        count = max(1, round(len(self) / size))
        yield from self.split(max(1, -(-len(self) // count)))

    def shuffled(self, generator: torch.Generator) -> Self:
        """The same rows in random order."""
        import torch

        return self.select(torch.randperm(len(self), generator=generator))


@dataclass(frozen=True)
class Example:
    """A text to generate an image of, with whatever a reward needs to know about it (an OCR target, parsed phrases)."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    place: str = field(default="", compare=False, repr=False)
    """Source location for messages ("prompts.txt, line 3"); may be empty."""

    @classmethod
    def of(cls, given: str | Example) -> Example:
        """Return an example as it is, and a text as an example without metadata."""
        return cls(given) if isinstance(given, str) else given


@dataclass(frozen=True)
class Prompt(Rows):
    """Text conditioning of N rows. Features are stored once per distinct text or example and gathered when read."""

    table: Tensor
    """(P, L, D) text features."""
    index: Tensor
    """(N,) each row's place in the tables."""
    pooled_table: Tensor | None = None
    """(P, E) pooled features, for models of the SDXL family."""
    text_table: tuple[str, ...] = ()
    """P texts, for surrogates that read them with an encoder of their own; empty where only features are known."""
    example_table: tuple[Example, ...] = ()
    """P examples, for rewards that read more than the text; empty where only texts are known. Two examples may share a
    text (see `alignkit.rollout.encode_examples`)."""

    def __len__(self) -> int:
        return len(self.index)

    def select(self, index: Tensor) -> Prompt:
        return replace(self, index=self.index[index.to(self.index.device)])

    def to(self, device: torch.device | str) -> Prompt:
        pooled = None if self.pooled_table is None else self.pooled_table.to(device)
        return replace(self, table=self.table.to(device), index=self.index.to(device), pooled_table=pooled)

    @property
    def texts(self) -> list[str]:
        """N texts."""
        return [self.text_table[i] for i in self.index.tolist()]

    @property
    def examples(self) -> list[Example]:
        """N examples: those that the rows were encoded from, or their texts alone where no more is known."""
        table = self.example_table or tuple(map(Example, self.text_table))
        return [table[i] for i in self.index.tolist()]

    @property
    def features(self) -> Tensor:
        """(N, L, D)."""
        return self.table[self.index]

    @property
    def pooled(self) -> Tensor | None:
        """(N, E), or None."""
        return None if self.pooled_table is None else self.pooled_table[self.index]


class EncodingCache(Protocol):
    """Encoded texts and images, kept on disk between runs (`[data] cache`)."""

    def get(self, encoder: str, content: str, encode: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the entry `content` of `encoder`, on the CPU; call `encode` and keep its answer if there is none.

        Both names become parts of a path. `encoder` must differ wherever weights, precision or device do, and
        `content` wherever the text or image does (hashes of them, say).
        """


@dataclass(frozen=True)
class PolicySettings:
    """Settings of a run that `Policy.load` is given: those of [model], and how to spend memory.

    A policy raises ConfigError for one that it cannot follow, such as a `unet` where it has none.
    """

    unet: str = ""
    """Folder, file or hub id of a network in the place of the checkpoint's own; empty: its own."""
    adapter: str = ""
    """Folder, file or hub id of a LoRA to merge before training; empty: none."""
    variant: str = ""
    """Ending of the files of weights, as "fp16"; empty: none, or the only one there is."""
    config: str = ""
    """Folder or hub id of the configs of a checkpoint of one file; empty: what suits its kind."""
    allow_pickle: bool = False
    """Whether weights may be pickled."""
    prediction: str = ""
    """Type of the network's output: "epsilon", "v_prediction", "sample" or "consistency"; empty: that of the
    checkpoint."""
    guidance_scale: float | None = None
    """Guidance scale while sampling, 1 for the conditional prediction; None: what suits the model."""
    guidance_embedding: int = 0
    """Width of an input for the guidance scale to add to the network; 0: none."""
    lora_rank: int = 16
    """Rank of the adapter to train; 0 trains all weights."""
    lora_targets: Sequence[str] = ()
    """Names of the layers to adapt; empty: those that suit the model."""
    trainable: bool = True
    """Whether the policy will be trained. A teacher is not: it has no `parameters` and needs no adapter."""
    device: torch.device | str = "cpu"
    """Device of the weights."""
    dtype: torch.dtype | None = None
    """Precision of weights that are not trained; None: float32. Trained weights are float32."""
    cache: EncodingCache | None = None
    """Keeps encoded texts and images; using it must not change a result. None: keep nothing."""
    gradient_checkpointing: bool = False
    """Whether to compute activations twice instead of keeping them."""
    rows_per_pass: int = 0
    """Rows that go through the network at once where no gradient is needed; 0: all."""


@dataclass(frozen=True)
class PolicyFacts:
    """Facts about a policy that are known before its weights load; None where they are not."""

    consistency: bool | None = None
    """Whether it is a latent consistency model (`Policy.consistency`)."""
    num_times: int | None = None
    """Number of its times, the length of `Policy.times()`."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Sections of a run file that suit the checkpoint where no registered model brings any: its sampler, mostly."""
    count_tokens: Callable[[str], tuple[int, int]] | None = field(default=None, compare=False)
    """Returns the largest number of tokens that the text encoders read, and the number in a text."""


@dataclass(frozen=True)
class PreferencePairs:
    """M pairs of images, each of one text; the first of a pair is preferred. They lie on the CPU."""

    winners: Tensor
    """(M, 3, H, W) float32 in [0, 1]."""
    losers: Tensor
    """The same."""
    captions: Sequence[str]
    """M texts."""


@dataclass(frozen=True)
class Batch:
    """Input of `Algorithm.collect`: texts to generate images of, and images or pairs where the algorithm needs them."""

    examples: Sequence[Example]
    images: Tensor | None = None
    """(M, 3, H, W) in [0, 1]."""
    captions: Sequence[Example] = ()
    """The M captions, each with the metadata of its image."""
    pairs: Iterable[PreferencePairs] = ()
    """All pairs of the round, a few at a time; each is read from disk once, when it is reached."""


@dataclass(frozen=True)
class Scores:
    """Scores of N images by one reward, or combined."""

    values: Tensor
    """(N,) float32."""
    valid: Tensor
    """(N,) bool; False where the image could not be scored."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """Named sub-scores, (N,) each."""
    reasons: Sequence[str] = ()
    """Short reasons for images that could not be scored: N texts, "" for the others; or none at all."""

    def select(self, rows: Tensor | slice) -> Scores:
        """Return the scores of some rows."""
        import torch

        places = torch.arange(len(self.reasons), device=self.values.device)[rows].tolist() if self.reasons else []
        parts = {name: part[rows] for name, part in self.parts.items()}
        return Scores(self.values[rows], self.valid[rows], parts, [self.reasons[place] for place in places])

    @property
    def reason(self) -> str:
        """The first of the reasons; "" if none is given."""
        return next(filter(None, self.reasons), "")


@dataclass(frozen=True)
class Transition:
    """The distribution of the next latent: normal, with independent components."""

    mean: Tensor
    """(N, *S) float32."""
    std: Tensor
    """(N,) float32; 0 marks a deterministic step, which has no density."""
    clean: Tensor
    """(N, *S) the policy's prediction of the clean latent at this step."""

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, (N, *S)."""
        return self.mean + _columns(self.std, self.mean) * noise

    def log_prob(self, x_next: Tensor, reduction: str = "mean") -> Tensor:
        """Log-density of `x_next` (N, *S), (N,) float32, over latent dimensions as `reduction`: "mean" or "sum".

        The mean is what all published code uses; clip ranges are tied to it. `x_next` is detached: the gradient
        flows through the mean alone. Raises ValueError where a step is deterministic.
        """
        import math

        if bool((self.std == 0).any()):
            raise ValueError("log_prob: the step is deterministic (std 0) and has no density; leave its rows out")
        std = _columns(self.std.float(), self.mean)
        squares = ((x_next.detach().float() - self.mean.float()) / std) ** 2 / 2
        density = (-squares - std.log() - 0.5 * math.log(2 * math.pi)).flatten(1)
        return density.mean(1) if reduction == "mean" else density.sum(1)


@dataclass(frozen=True)
class Prediction(Rows):
    """One call of `Policy.denoise`, N rows: its arguments and its result."""

    x: Tensor
    """(N, *S) the noisy latent."""
    t: Tensor
    """(N,) its time, as the network takes it."""
    prompt: Prompt
    guidance_scale: Tensor | None
    """(N,), or None for the policy's own."""
    clean: Tensor
    """(N, *S) the clean latent, with gradient."""


def _columns(values: Tensor, like: Tensor) -> Tensor:
    """(N,) as (N, 1, 1, ...) with as many axes as `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))
