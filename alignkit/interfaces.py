"""The interfaces that a plugin implements.

Letters in shapes: N rows, K sampler steps, S = (C, h, w) one latent, L tokens, D text features, P distinct texts,
(H, W) pixels. This module imports torch for annotations only, so that listing plugins stays quick.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, TypeVar

from annotated_types import Ge

from alignkit.errors import ConfigError
from alignkit.records import Batch, Example, PolicyFacts, PolicySettings, Prediction, Prompt, Rows, Scores, Transition

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Policy(ABC):
    """The network under training, seen through one prediction: the clean latent.

    Latents follow x_t = alpha(t) clean + sigma(t) noise, whatever the network predicts inside. The core asks each class
    that is registered with `register_policies` whether it `serves` a checkpoint, and builds the policy with `load`.
    All tensors are on `device`, and each row of a batch is treated as if it were alone.
    """

    latent_shape: tuple[int, int, int]
    """S = (C, h, w)."""
    image_size: int
    """Edge of the square images that `decode` returns and `encode_images` takes, in pixels."""
    device: torch.device
    guidance_scale: float
    """Guidance scale that `denoise` uses when none is given, as in diffusers: 1 is the conditional prediction."""
    guidance_embedded: bool = False
    """Whether the network takes the guidance scale as an input, and so has no prediction without one."""
    consistency: bool = False
    """Whether the network is a latent consistency model; samplers that are for these alone refuse any other."""
    source: str = ""
    """Folder or hub id that the networks were loaded from; surrogates start from copies of them. Empty: none."""

    @classmethod
    @abstractmethod
    def serves(cls, source: str) -> bool:
        """Whether `load` can open `source`, a folder or hub id. Cheap: reads an index at most, and no weights.

        False for a folder that is missing or in another format. A hub id is not looked up.
        """

    @classmethod
    def facts(cls, source: str, settings: PolicySettings) -> PolicyFacts:
        """Return what is known of the policy that `load` would build; by default nothing.

        Called before anything loads, for a source that is served. Cheap: reads an index or a config at most, and looks
        up no hub id. Raises ConfigError for settings that `load` would refuse, as far as this shows without weights.
        """
        return PolicyFacts()

    @classmethod
    def check(cls, source: str, settings: PolicySettings) -> list[str]:
        """Open the configs and headers of the files that `load` would open, but no weights; look up no hub id.

        Returns a line for each part of them that `load` would not use. Raises ConfigError, in one line, for what is
        missing or would not fit.
        """
        return []

    @classmethod
    @abstractmethod
    def load(cls, source: str, settings: PolicySettings) -> Policy:
        """Build the policy of a checkpoint. Raises ConfigError, in one line, for what is missing or does not fit."""

    @abstractmethod
    def times(self) -> Tensor:
        """Every time that the network is trained at, (T,) with T > 1, on the CPU.

        Ascending from the least noise to pure noise, as `schedule` and `denoise` take them: integers or floats.
        Samplers and losses take times from this table, by position, and compute none.
        """

    @abstractmethod
    def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma, (N,) float32 in [0, 1], at times t (N,). sigma / alpha rises with t; sigma is above 0 at
        every time, and nearly or exactly 1 at the last."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Prompt:
        """Conditioning for N texts, without gradient; equal texts share their features. `text_table` is filled in."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """(N, 3, image_size, image_size) in [0, 1] to latents (N, *S) float32, scaled as the network takes them.
        Deterministic, without gradient."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """(N, *S) to float32 (N, 3, image_size, image_size) in [0, 1]; differentiable."""

    @abstractmethod
    def denoise(self, x: Tensor, t: Tensor, prompt: Prompt, guidance_scale: Tensor | None = None) -> Tensor:
        """The clean latent (N, *S) float32 predicted from x (N, *S) at times t (N,); differentiable.

        `guidance_scale` (N,) is g in clean("") + g (clean(prompt) - clean("")), as in diffusers; the LCM paper's w is
        g - 1. It is embedded where the network takes an embedding and computed by two passes where it does not.
        """

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Features (N, D) float32 of images (N, 3, image_size, image_size) in [0, 1], without gradient.

        They come from the model before training, so that the drift of a run is always measured with the same network.
        """

    def feature_maps(self, x: Tensor, t: Tensor, prompt: Prompt, layers: Sequence[str]) -> list[Tensor]:
        """Outputs (N, c, h, w) float32 of these layers, while the network predicts from x (N, *S) at times t (N,) under
        the prompt, without guidance; differentiable.

        The weights are those of now: call it within `reference` for the model before training, and compute the gradient
        there as well. Raises ConfigError that names the layers there are; by default there are none.
        """
        raise ConfigError(f"layers: found {', '.join(layers)}, expected none: {type(self).__name__} names no layers")

    @abstractmethod
    def parameters(self) -> list[torch.nn.Parameter]:
        """The trained parameters, float32, in a fixed order; none where the policy is not trained."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The trained parameters themselves by name, in the order of `parameters`."""

    @abstractmethod
    def using(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Predict with these tensors in the place of the trained ones of the same names (an average, say)."""

    @abstractmethod
    def reference(self) -> AbstractContextManager[None]:
        """Predict as before training, without gradient; also within itself and within `using`."""

    @abstractmethod
    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> Path:
        """Write the trained part with these weights into `folder`, for use without alignkit. Returns what was written.
        Equal weights give equal files."""

    @abstractmethod
    def read_export(self, folder: Path) -> dict[str, Tensor]:
        """Return the weights that `export` wrote into `folder`, by the names of `weights`, on the policy's device.

        Raises ConfigError if they are missing or of another form."""


@dataclass
class Sampler(ABC):
    """Steps from noise to a clean latent, `num_steps` of them."""

    consistency: ClassVar[bool] = False
    """Whether this sampler is for latent consistency models alone."""

    num_steps: Annotated[int, Ge(1)] = 2
    """Network passes for one image."""

    def check(self, facts: PolicyFacts) -> None:
        """Raise ConfigError if these fields cannot work with such a policy. Called before any weight loads."""
        return

    @abstractmethod
    def grid(self, policy: Policy) -> Tensor:
        """The times of the steps, (K,) entries of `policy.times()`, the noisiest first."""

    @abstractmethod
    def transition(self, policy: Policy, x: Tensor, k: Tensor, prompt: Prompt) -> Transition:
        """The distribution of the next latent of x (N, *S) at step k (N,), 0 for the first."""

    def initial_scale(self, policy: Policy) -> float:
        """Factor of the unit noise that the first step begins with."""
        return 1.0

    def stochastic_steps(self) -> int:
        """Number of steps that have a likelihood, from the fields alone, before any weight loads; all by default."""
        return self.num_steps

    def distilled_steps(self) -> int:
        """Return the solver steps with which a latent consistency model must be distilled for this sampler; 0 where
        there is no such number."""
        return 0


class Reward(ABC):
    """A number for an image and its text; may be a black box."""

    @property
    def differentiable(self) -> bool:
        """Whether the score has a useful gradient with respect to the pixels.

        A class whose fields decide nothing may set a ClassVar instead, here and for the four properties below.
        """
        return False

    @property
    def deterministic(self) -> bool:
        """Whether the same image and text always get the same score, whatever else is scored and when."""
        return True

    @property
    def slow(self) -> bool:
        """Whether scoring takes long (a server, a large model). It then runs in a thread of its own, one call after
        another, while the next images are generated or decoded and other rewards are computed."""
        return False

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """The lowest and highest score; None where there is no bound."""
        return None, None

    @property
    def origin(self) -> str:
        """Name of the code that messages blame for a fault of the reward; empty: the distribution that registers it."""
        return ""

    def check(self, examples: Iterable[Example]) -> None:
        """Raise ConfigError naming an example that can never be scored. Called before any weight loads, and again
        with fewer of them, or none, to find the first that is rejected. Sends nothing to other machines."""
        return

    def check_server(self, examples: Iterable[Example]) -> None:
        """Ask the server that scores, where there is one, whether it is there and can score the examples.

        As `check`, and after it; `alignkit check` calls it with --servers alone. Sends no image."""
        return

    def explain(self, example: Example) -> list[str]:
        """Return the questions about an image of this text, one a line; empty if the text is read as it is. Needs no
        weights. Raises ConfigError as `check`."""
        return []

    def tokens(self, example: Example) -> tuple[int, int] | None:
        """Return the largest number of tokens that are read, and the number in this text; called after `load`. None,
        the default, if the reward does not know."""
        return None

    def load(self, device: torch.device) -> None:
        """Load what is needed to score; the only place that touches files or the network. Calling it twice is fine."""
        return

    def fingerprint(self) -> str:
        """Return a string that changes whenever scores could: settings, weights, versions; called after `load`.

        Scores of a reward that is deterministic, has no gradient and has a fingerprint are cached. Empty, the default,
        caches none: for rewards that are quicker to compute than to look up, or cannot notice every change.
        """
        return ""

    def identity(self) -> str:
        """Identify the backend when settings alone do not (the model at a URL); called after `load`.

        Stored with the run; resuming fails if it changed. Empty, the default: the settings identify it.
        """
        return ""

    @abstractmethod
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor | Scores:
        """Return the scores (N,) of images (N, 3, H, W) float32 in [0, 1], whose values are those of 8-bit files.

        Changes neither argument. Raises TransientError if a retry may help.
        """


class Surrogate(ABC):
    """A learned, differentiable approximation of a reward that reads latents instead of images."""

    @abstractmethod
    def load(self, policy: Policy) -> None:
        """Build the network for this policy's latents, on its device."""

    @abstractmethod
    def score(self, latents: Tensor, prompt: Prompt) -> Tensor:
        """Return the scores (N,) float32 of latents (N, *S), with gradient to the latents."""

    @abstractmethod
    def loss(self, winner: Tensor, loser: Tensor, prompt: Prompt) -> Tensor:
        """Return a scalar, the mean over pairs of latents (N, *S) of which the true reward prefers the first."""

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
    """A training method: what it collects (C), the rows it learns from (R), and the loss on them.

    Subclasses are dataclasses: their fields are the hyper-parameters.

    One round of the core is: `collect`, every item of `surrogate_updates` and then of `updates` as one optimizer step
    each (split into passes for memory), `after_update` after each step of the policy.
    """

    default_surrogate: ClassVar[str] = ""
    """Name of the surrogate of a run that names none."""

    default_regularisers: ClassVar[Mapping[str, float]] = {}
    """Regularisers, name to weight, of a run that lists none."""

    surrogate_type: ClassVar[type] = Surrogate
    """Class that its surrogate must be an instance of; checked by the core before any weight loads."""

    samples_images: ClassVar[bool] = True
    """Whether it samples images of prompts. A method that learns from given images or pairs alone runs without any
    prompts."""

    takes_advantages: ClassVar[bool] = False
    """Whether it learns from advantages and takes them by `alignkit.advantage.of_terms`, so that each of several
    rewards can have its own (`scoring.combine = "advantage"`)."""

    @property
    def needs(self) -> frozenset[str]:
        """The needs of these fields, checked by the core: some of "surrogate", "teacher", "images", "pairs",
        "stochastic_steps", "differentiable_reward". A class whose fields decide nothing may set a ClassVar instead."""
        return frozenset()

    @property
    def uses_rewards(self) -> bool:
        """Whether it learns from rewards. One that does not runs without any; those that are named are only measured.
        A class whose fields decide nothing may set a ClassVar instead."""
        return True

    def check(self, sampler: Sampler, facts: PolicyFacts) -> None:
        """Raise ConfigError if these fields cannot work with this sampler and such a policy. Called before any weight
        loads, and again when more is known of the policy."""
        return

    def setup(self, ctx: Context) -> None:
        """Called once, after the weights are loaded."""
        return

    @abstractmethod
    def collect(self, batch: Batch, ctx: Context) -> C:
        """Return what to learn from; called without gradient."""

    @abstractmethod
    def updates(self, collected: C, ctx: Context) -> Iterator[R]:
        """Yield the rows of one policy update after another, `ctx.rows_per_update` each."""

    @abstractmethod
    def loss(self, rows: R, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a scalar, the mean over rows, and metrics that are means over rows."""

    def surrogate_updates(self, collected: C, ctx: Context) -> Iterator[Any]:
        """Yield the rows of one surrogate update after another; none by default."""
        return iter(())

    def surrogate_loss(self, rows: Any, ctx: Context) -> Tensor:
        """Return a scalar, the mean over rows; needed where `surrogate_updates` yields."""
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

    @property
    def needs(self) -> frozenset[str]:
        """The needs of these fields, checked by the core: some of "teacher", "images", "predictions". With
        "predictions", `loss` receives what the policy predicted, with gradient, while the algorithm computed its own
        loss. A class whose fields decide nothing may set a ClassVar instead."""
        return frozenset()

    def check(self, sampler: Sampler, facts: PolicyFacts) -> None:
        """Raise ConfigError if these fields cannot work with this sampler and such a policy. Called before any weight
        loads, and again when more is known of the policy."""
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
    """A named model: its location and the run settings that suit it."""

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
    recipes: Mapping[str, str] = field(default_factory=dict)
    """Registered recipes, whose settings win over all of these, that runs take by default: by name of the algorithm, or
    "algorithm/reward" as above."""
