"""The interfaces that a plugin implements.

Letters in shapes: N rows, K sampler steps, S = (C, h, w) one latent, L tokens, D text features, P distinct texts,
(H, W) pixels. This module imports torch for annotations only, so that listing plugins stays quick.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, TypeVar

from annotated_types import Ge

from alignkit.records import Batch, Example, Prediction, Prompt, Rows, Scores, Transition

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Policy(ABC):
    """The network under training, seen through one prediction: the clean latent."""

    latent_shape: tuple[int, int, int]
    """S = (C, h, w)."""
    device: torch.device
    guidance_scale: float
    """The guidance scale that `denoise` uses when none is given, as in diffusers: 1 is the conditional prediction."""
    guidance_embedded: bool = False
    """Whether the network takes the guidance as an input, and so has no prediction without one."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Prompt:
        """Conditioning for N texts; equal texts share their features."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] to latents (N, *S), scaled as the network takes them."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """(N, *S) to float32 (N, 3, H, W) in [0, 1]; differentiable."""

    @abstractmethod
    def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma, (N,) float32, at times t (N,) as the network takes them: x_t = alpha clean + sigma noise."""

    @abstractmethod
    def denoise(self, x: Tensor, t: Tensor, prompt: Prompt, guidance_scale: Tensor | None = None) -> Tensor:
        """The clean latent (N, *S) predicted from x (N, *S) at times t (N,).

        `guidance_scale` (N,) is g in clean("") + g (clean(prompt) - clean("")), as in diffusers; the LCM paper's w is
        g - 1. It is embedded where the network takes an embedding and computed by two passes where it does not.
        """

    @abstractmethod
    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained, in a fixed order."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The trained tensors by name, not copied, in the order of `parameters`."""

    @abstractmethod
    def using(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Predict with these tensors in the place of the trained ones (an average, say)."""

    @abstractmethod
    def reference(self) -> AbstractContextManager[None]:
        """Predict as before training, without gradient."""


@dataclass
class Sampler(ABC):
    """How to walk from noise to a clean latent in `num_steps` steps."""

    consistency: ClassVar[bool] = False
    """Whether this walk is for latent consistency models alone."""

    num_steps: Annotated[int, Ge(1)] = 2
    """Network passes for one image."""

    @abstractmethod
    def grid(self, policy: Policy) -> Tensor:
        """The times of the steps, (K,), the noisiest first."""

    @abstractmethod
    def transition(self, policy: Policy, x: Tensor, k: Tensor, prompt: Prompt) -> Transition:
        """The distribution of the next latent of x (N, *S) at step k (N,)."""

    def initial_scale(self, policy: Policy) -> float:
        """What unit noise is multiplied with before the first step."""
        return 1.0

    def stochastic_steps(self) -> int:
        """How many of the steps have a likelihood, as the fields tell it before any weight loads; all by default."""
        return self.num_steps


class Reward(ABC):
    """A number for an image and its text; may be a black box."""

    differentiable: ClassVar[bool] = False
    """Whether the score has a useful gradient with respect to the pixels."""
    deterministic: ClassVar[bool] = True
    """Whether the same image and text always get the same score, whatever else is scored and when."""
    slow: ClassVar[bool] = False
    """Whether a call takes long, to a server or a large VQA model. Calls then run one after another in a thread of
    their own, while the next images are generated or decoded and other rewards answer."""
    bounds: ClassVar[tuple[float | None, float | None]] = (None, None)
    origin: ClassVar[str] = ""
    """Owner of the code that messages about a fault of this reward name; empty: the distribution that registers it."""

    def check(self, examples: Iterable[Example]) -> None:
        """Raise ConfigError naming an example that can never be scored. Called before any weight loads, and again with
        fewer examples, or none, to find the first that is refused."""
        return

    def explain(self, example: Example) -> list[str]:
        """Return the questions that this reward puts about an image of this text; none if it reads the text as it is.
        Needs no weights. Raises ConfigError as `check`."""
        return []

    def tokens(self, example: Example) -> tuple[int, int] | None:
        """Return the limit of tokens that are read, and the number in this text; called after `load`. None, the
        default: unknown."""
        return None

    def load(self, device: torch.device) -> None:
        """Load what is needed to score; the only place that touches files or the network. Calling it twice is fine."""
        return

    def fingerprint(self) -> str:
        """Return a string that changes whenever scores could: settings, weights, versions. Called after `load`.

        Scores of a deterministic reward without gradient are cached under its fingerprint. Empty, the default, caches
        none: for rewards that are faster to compute than to look up, or whose state is unknown.
        """
        return ""

    def identity(self) -> str:
        """Identify the backend when settings alone do not (the model behind a URL); called after `load`.

        It is stored with the run; resuming fails if it changed. Empty, the default: the settings identify it.
        """
        return ""

    @abstractmethod
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor | Scores:
        """Scores (N,) of images (N, 3, H, W) float32 in [0, 1], as the 8-bit files that would be saved.

        Changes neither. Raises TransientError if another call may succeed.
        """


class Surrogate(ABC):
    """A learned, differentiable stand-in for a reward, computed from latents."""

    @abstractmethod
    def load(self, policy: Policy) -> None:
        """Build the network for this policy's latents, on its device."""

    @abstractmethod
    def score(self, latents: Tensor, prompt: Prompt) -> Tensor:
        """Score latents (N, *S), (N,) float32, with gradient to the latents."""

    @abstractmethod
    def loss(self, winner: Tensor, loser: Tensor, prompt: Prompt) -> Tensor:
        """Return a scalar mean over pairs of latents (N, *S), of which the true reward prefers the first."""

    @abstractmethod
    def module(self) -> torch.nn.Module:
        """Return the network: its parameters are trained, its state dict is saved."""


class Context(ABC):
    """All that an algorithm may touch during a run; the core implements it."""

    policy: Policy
    teacher: Policy | None
    sampler: Sampler
    surrogate: Surrogate | None
    generator: torch.Generator
    """The only source of random numbers, on the CPU so that runs agree across devices."""
    update: int
    """Finished updates of the policy."""
    warming_up: bool
    """Whether this round trains the surrogate alone."""
    rows_per_update: int
    """Rows of one policy update in this process."""

    @abstractmethod
    def noise(self, count: int) -> Tensor:
        """Sample unit normal latents (count, *S) on the policy's device, from `generator`."""

    @abstractmethod
    def score(
        self,
        latents: Tensor,
        examples: Sequence[Example],
        log: bool = True,
        others: Sequence[tuple[int, Example]] = (),
    ) -> Scores:
        """Decode clean latents (N, *S) and score them, a few at a time, without gradient.

        With `log` the reward is logged: leave it out where the samples are not the policy's own for these examples.
        Every process must call it equally often.

        `others` are M further pairs of (row of `latents`, example), which score images under the texts of others; no
        image is decoded twice for them. The N + M scores have theirs last, and these are never logged. Raises
        IndexError for a row out of range.

        `values` are the combined rewards to learn from, as `[scoring]` says; `parts` hold those of each reward.
        """

    @abstractmethod
    def differentiable_score(self, latents: Tensor, examples: Sequence[Example], log: bool = False) -> Scores:
        """Score as `score` does, all at once, with gradient through reward and decoder to the latents."""

    @abstractmethod
    def terms(self, scores: Scores) -> Mapping[str, tuple[float, Tensor]]:
        """Return the rewards to take advantages of, (weight, rewards (N,)) by name; NaN marks an unscored image.

        There is one term, named "", with the combined values; with scoring.combine = "advantage" there is one for each
        reward. See `alignkit.advantage.of_terms`.
        """

    @abstractmethod
    def gather(self, values: Tensor) -> Tensor:
        """Return the rows of all processes, in rank order; `values` itself in a single process."""

    @abstractmethod
    def log(self, **metrics: float | Tensor) -> None:
        """Add to the metrics of the current update; values of one name are averaged."""

    @abstractmethod
    def warn(self, message: str) -> None:
        """Show a warning to the user once, and record it with the metrics."""


C = TypeVar("C")
R = TypeVar("R", bound=Rows)


class Algorithm(ABC, Generic[C, R]):
    """A method: the data to collect (C), the rows to learn from (R), and the loss on them.

    Subclasses are dataclasses: their fields are the hyper-parameters.

    One round of the core is: `collect`, every item of `surrogate_updates` and then of `updates` as one optimizer step
    each (split into passes for memory), `after_update` after each step of the policy.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """Of "surrogate", "teacher", "images", "pairs", "stochastic_steps", "differentiable_reward"; checked by the core.

    What depends on the fields is set on the instance, in `__post_init__`.
    """

    default_surrogate: ClassVar[str] = ""
    """Name of the surrogate in a run that names none."""

    default_regularisers: ClassVar[Mapping[str, float]] = {}
    """Regularisers, name to weight, of a run that lists none."""

    surrogate_type: ClassVar[type] = Surrogate
    """Class that its surrogate must be an instance of; checked by the core before any weight loads."""

    draws: ClassVar[bool] = True
    """Whether it generates images of prompts; one that learns from given images or pairs alone needs no prompts."""

    uses_rewards: ClassVar[bool] = True
    """Whether it learns from rewards. One that does not runs without any; those that are named are only measured."""

    takes_advantages: ClassVar[bool] = False
    """Whether it learns from advantages and takes them by `alignkit.advantage.of_terms`, so that each of several
    rewards can have its own (`scoring.combine = "advantage"`)."""

    def check(self, sampler: Sampler) -> None:
        """Raise ConfigError if these fields cannot work with this sampler. Called before any weight loads."""
        return

    def setup(self, ctx: Context) -> None:
        """Called once, after the weights are loaded."""
        return

    @abstractmethod
    def collect(self, batch: Batch, ctx: Context) -> C:
        """Collect what a round learns from; called without gradient."""

    @abstractmethod
    def updates(self, collected: C, ctx: Context) -> Iterator[R]:
        """Yield the rows of one policy update after another, `ctx.rows_per_update` each."""

    @abstractmethod
    def loss(self, rows: R, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a scalar mean over rows, and metrics that are means over rows."""

    def surrogate_updates(self, collected: C, ctx: Context) -> Iterator[Any]:
        """Yield the rows of one surrogate update after another; none by default."""
        return iter(())

    def surrogate_loss(self, rows: Any, ctx: Context) -> Tensor:
        """Return a scalar mean over rows; needed if `surrogate_updates` yields."""
        raise NotImplementedError

    def after_update(self, ctx: Context) -> None:
        """Called after each policy update (averages, counters)."""
        return

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: tensors and JSON values, nested in dicts and lists."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        return


class Regulariser(ABC, Generic[C, R]):
    """A term that the trainer adds, times its weight, to the loss of any algorithm.

    Subclasses are dataclasses: their fields are the hyper-parameters. C is what it keeps of a round's batch, R the rows
    of one update.

    In each round the core calls `collect` once, then for each update of the policy `rows`, `loss` once a pass, and
    `after_update`. During the warm-up of a surrogate it calls none of them.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """Requirements that the core checks: "teacher", "images", "predictions". With "predictions", `loss` receives what
    the policy predicted, with gradient, while the algorithm computed its own loss."""

    def check(self, sampler: Sampler) -> None:
        """Raise ConfigError if these fields cannot work with this sampler. Called before any weight loads."""
        return

    def setup(self, ctx: Context) -> None:
        """Called once, after the weights are loaded and after `Algorithm.setup`."""
        return

    def collect(self, batch: Batch, ctx: Context) -> C | None:
        """Compute once, for all updates of a round, what does not change between them (latents of images); called
        without gradient after `Algorithm.collect`. None by default."""
        return None

    def rows(self, collected: C | None, count: int, ctx: Context) -> R | None:
        """Return `count` rows for one update, as many as the algorithm has, or None if the term needs none.

        Called without gradient, after `Algorithm.updates` has yielded its rows. All randomness belongs here, from
        `ctx.generator`; the rows are split into passes as those of the algorithm.
        """
        return None

    @abstractmethod
    def loss(self, rows: R | None, predictions: Sequence[Prediction], ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the term before its weight, a scalar mean over rows, and metrics that are means over rows.

        `predictions` are those of the same pass, in order; empty without "predictions" in `needs`.
        """

    def after_update(self, ctx: Context) -> None:
        """Called after each policy update, after `Algorithm.after_update`."""
        return

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: tensors and JSON values, nested in dicts and lists."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        return


@dataclass(frozen=True)
class ModelBundle:
    """A named model: its checkpoint and the run settings that suit it."""

    path: str
    """A hub id or a local diffusers folder."""
    teacher: str | None = None
    """Hub id or folder of the model it was distilled from."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Sections of a run file, for every algorithm. "regulariser" may be a list, as in a run file, or a table from names
    to fields that suit the model wherever a run lists that regulariser."""
    algorithm_defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Sections by name of the algorithm, which win over `defaults`. Those under "algorithm/reward" hold for that
    algorithm where this is the only reward to train on, and win in turn."""
