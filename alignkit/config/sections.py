"""The sections of a run file as dataclasses. Those of plugins hold a name and the plugin's own fields."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ModelConfig:
    """The model under training, and how much of it is trained."""

    name: str = "shapes_lcm"
    """A registered model (`alignkit list models`), a hub id or a diffusers folder."""
    policy: str = ""
    """The policy that loads the model and its teacher (`alignkit list policies`); empty: the one that serves the
    checkpoint."""
    teacher: str = ""
    """A hub id or a folder of the model it was distilled from; empty: what the registered model says."""
    unet: str = ""
    """A UNet in the place of the pipeline's own (SDXL-Lightning, LCM for SDXL): a hub id, a folder, a .safetensors
    file, or owner/name/file.safetensors on the hub."""
    adapter: str = ""
    """A LoRA that is merged into the model before anything else (LCM-LoRA, an earlier run), named as for unet."""
    prediction: Literal["", "epsilon", "v_prediction", "sample", "consistency"] = ""
    """How to read the network where unet or adapter changed it; "consistency" is an LCM. Empty: as the pipeline's
    scheduler says."""
    lora_rank: int = 16
    """Rank of the LoRA adapter; 0 trains all weights."""
    guidance_embedding: int = 0
    """Width of an input for the guidance that the network is given (256 in published models), for distilling a model of
    many steps into a latent consistency model; takes prediction = "consistency" and lora_rank = 0. 0: as it is."""
    lora_targets: list[str] = field(default_factory=list)
    """Names of the layers to adapt, as peft understands them; empty: the attention projections."""
    guidance_scale: float | None = None
    """Guidance scale while sampling, as in diffusers: 1 or less is the conditional prediction; left out: what suits the
    model."""

    def __post_init__(self) -> None:
        name = repr(self.name), bool(self.name), "a name"
        width, widened = self.guidance_embedding, self.prediction == "consistency" and not self.lora_rank
        expected = '0, or with prediction = "consistency" and lora_rank = 0 an even number from 4 on'
        require(
            name=name,
            lora_rank=or_more(self.lora_rank, 0),
            guidance_embedding=(width, not width or (widened and width >= 4 and width % 2 == 0), expected),
            guidance_scale=finite(self.guidance_scale),
        )


@dataclass(frozen=True)
class DataConfig:
    """What to draw during training."""

    prompts: str = ""
    """A .txt file with one prompt a line, a .jsonl file of objects with "text" and what the reward needs to know, or a
    .parquet file; or a set that comes along: animals, attributes, counting or spatial, or one of these with _held_out
    behind."""
    prompt_column: str = ""
    """Where .jsonl and .parquet files hold the prompt; empty: "text", "prompt" or "caption"."""
    images: str = ""
    """Captioned images, for algorithms that need them: a folder, a .jsonl file, .tar shards as
    "shards/{0000..0012}.tar", a data set as "datasets:owner/name", or "package.module:Class"."""
    caption_column: str = ""
    """Where tables, .json members and data sets hold the caption; empty: "text", "caption" or "prompt"."""
    pairs: str = ""
    """Preference pairs, for algorithms that need them: a folder with pairs.jsonl (`alignkit pairs` makes one), a .jsonl
    file, .parquet in Pick-a-Pic's columns or a folder of it, or "package.module:Class"."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do about prompts, images and pairs that are missing or cannot be read: end the run, or leave them out
    and name them."""
    cache: str = ""
    """A folder that keeps what prompts and images are encoded to, so that it is done once; empty: none."""
    batch_size: int = 16
    """Prompts of one round."""

    def __post_init__(self) -> None:
        require(batch_size=or_more(self.batch_size, 1))


@dataclass(frozen=True)
class PluginConfig:
    """A plugin by name, with all its fields."""

    name: str = ""
    """Which plugin; `alignkit list` shows all."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Every field of the plugin's class, those left at their default included."""


@dataclass(frozen=True)
class RewardConfig(PluginConfig):
    """A reward and its share in the sum."""

    weight: float = 1.0
    """Its factor in the sum of all rewards."""
    at_least: float | Literal["start"] | None = None
    """What its mean must not fall below: a number, or "start" for its mean in the first rounds (scoring.start_rounds).
    It is held there by a Lagrange multiplier that is added to the weight."""

    def __post_init__(self) -> None:
        require(weight=finite(self.weight), at_least=finite(self.at_least))


@dataclass(frozen=True)
class ScoringConfig:
    """How several rewards become what is learned from, and how rewards are asked."""

    combine: Literal["sum", "normalised", "advantage"] = "sum"
    """"sum": the weighted sum of the scores as they are. "normalised": of each score less its running mean, over its
    running standard deviation. "advantage": the advantages of each reward apart, then their weighted sum (GDPO)."""
    statistics_decay: float = 0.99
    """What a round's scores still count for in the running statistics a round later; 1 forgets nothing."""
    start_rounds: int = 4
    """Rounds whose mean is the "start" of a reward's at_least, the warm-up of a surrogate included; until then nothing
    is held."""
    multiplier_rate: float = 0.1
    """How much a multiplier grows in a round for each standard deviation that the mean of the reward lies too low."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do about a score that is NaN or infinite: end the run and name the reward, or count the image as not
    scored, and tell."""
    retries: int = 4
    """Times that a reward is asked again when it fails for a reason that may pass (a server that does not answer)."""
    retry_seconds: float = 1.0
    """Wait before the first of them; each further wait is twice as long."""
    retry_limit: float = 300.0
    """Seconds after which it is not asked again about the same images, however many tries are left: a bound for
    servers that hang."""
    overlap: bool = True
    """Whether slow rewards answer in threads of their own while the next images are decoded or drawn. It changes no
    result."""
    cache: str = ""
    """A file that keeps the scores of slow black boxes, to share between runs; empty: scores.sqlite in the run
    folder."""

    def __post_init__(self) -> None:
        decay = self.statistics_decay
        require(
            statistics_decay=(decay, 0 < decay <= 1, "more than 0 and at most 1"),
            start_rounds=or_more(self.start_rounds, 1),
            multiplier_rate=above_zero(self.multiplier_rate),
            retries=or_more(self.retries, 0),
            retry_seconds=or_more(self.retry_seconds, 0),
            retry_limit=(self.retry_limit, self.retry_limit >= 0, "0 or more"),
        )


@dataclass(frozen=True)
class SurrogateConfig(PluginConfig):
    """A learned stand-in for the reward, and how it is trained."""

    init: str = ""
    """A run folder or a .safetensors file to start from; empty: as the plugin begins."""
    warmup: int = 0
    """Batches the surrogate learns from before the first update of the policy."""
    learning_rate: float = 1e-4
    """Step size of AdamW."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; inf: never."""

    def __post_init__(self) -> None:
        require(
            warmup=or_more(self.warmup, 0),
            learning_rate=above_zero(self.learning_rate),
            weight_decay=or_more(self.weight_decay, 0),
            max_grad_norm=(self.max_grad_norm, self.max_grad_norm > 0, "more than 0"),  # inf: not at all
        )


@dataclass(frozen=True)
class RegulariserConfig(PluginConfig):
    """A term that is added to the loss of the algorithm."""

    weight: float = 1.0
    """Its factor in the loss; 0 leaves it out, with all that it needs."""

    def __post_init__(self) -> None:
        require(weight=or_more(self.weight, 0))


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    updates: int = 200
    """Optimizer steps of the policy; 0 measures the model as it is."""
    rows_per_update: int = 32
    """Rows behind one optimizer step: a choice of learning."""
    rows_per_pass: int = 32
    """Rows that go through the network at once: a choice of memory, which changes no result."""
    gradient_checkpointing: bool = False
    """Whether model, teacher and decoder compute their activations again on the way back instead of keeping them: less
    memory, more time, the same result."""
    learning_rate: float = 1e-4
    """Step size of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What becomes of the learning rate behind the warm-up: it stays, or falls to 0 at the end of the run."""
    warmup: int = 0
    """Updates over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; inf: never."""
    ema_decay: float = 0.99
    """Decay of the average of the trained weights, which evaluation and export use; 0: no average."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision; "no" is float32."""
    checkpoint_every: int = 50
    """Updates between checkpoints; 0: one at the end."""
    keep_checkpoints: int = 2
    """Older checkpoints are deleted."""
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    """Where metrics go besides metrics.jsonl."""
    device: Literal["", "cpu"] = ""
    """Empty: the best there is (CUDA_VISIBLE_DEVICES chooses among GPUs)."""

    def __post_init__(self) -> None:
        require(
            updates=or_more(self.updates, 0),
            rows_per_update=or_more(self.rows_per_update, 1),
            rows_per_pass=or_more(self.rows_per_pass, 1),
            learning_rate=above_zero(self.learning_rate),
            warmup=(self.warmup, 0 <= self.warmup <= max(self.updates, 0), f"0 to updates, which is {self.updates}"),
            weight_decay=or_more(self.weight_decay, 0),
            max_grad_norm=(self.max_grad_norm, self.max_grad_norm > 0, "more than 0"),  # inf: not at all
            ema_decay=(self.ema_decay, 0 <= self.ema_decay < 1, "at least 0 and less than 1"),
            checkpoint_every=or_more(self.checkpoint_every, 0),
            keep_checkpoints=or_more(self.keep_checkpoints, 1),
        )


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured on prompts that are not trained on."""

    every: int = 50
    """Updates between evaluations; 0: only before and after the run."""
    prompts: str = ""
    """A file as for data.prompts."""
    steps: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Numbers of sampler steps."""
    limit: int = 64
    """Prompts used, from the top of the file."""
    samples: int = 1
    """Images of each prompt, over which its score is the mean: intervals get narrower, and take as much longer."""
    seed: int = 1000
    """Seed of the noise, the same at every evaluation."""
    rewards: list[str | dict[str, Any]] = field(default_factory=list)
    """Rewards that are measured and not trained on, besides those of the run: names, or tables with a name and fields
    of the reward, which may be written as [[evaluate.rewards]]."""
    batch_size: int = 32
    """Images drawn at once."""

    def __post_init__(self) -> None:
        require(
            every=or_more(self.every, 0),
            steps=(self.steps, bool(self.steps) and min(self.steps) >= 1, "a list of numbers, each 1 or more"),
            limit=or_more(self.limit, 1),
            samples=or_more(self.samples, 1),
            batch_size=or_more(self.batch_size, 1),
        )

    def unmeasured(self) -> str:
        """What to tell about `rewards` that are asked for and never measured; empty where there are none."""
        if not self.rewards or self.prompts:
            return ""
        names = ", ".join(self.held_out_rewards())
        return f"evaluate.rewards: not measured ({names}), because evaluate.prompts names no held-out prompts"

    def held_out_rewards(self) -> dict[str, dict[str, Any]]:
        """The fields of `rewards` by name."""
        tables: list[dict[str, Any]] = [{"name": e} if isinstance(e, str) else e for e in self.rewards]
        return {table["name"]: {k: v for k, v in table.items() if k != "name"} for table in tables}


@dataclass(frozen=True)
class RunConfig:
    """A whole run, every default filled in."""

    sampler: PluginConfig
    algorithm: PluginConfig
    rewards: list[RewardConfig]
    regularisers: list[RegulariserConfig] = field(default_factory=list)
    surrogate: SurrogateConfig | None = None
    output: str = ""
    """The run folder; empty: runs/<date>-<algorithm>, with a number behind it from the second of a day on."""
    seed: int = 0
    """Seed of everything that is drawn."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        require(seed=or_more(self.seed, 0))


TOP: dict[str, type] = {"output": str, "seed": int}
"""Keys above all sections."""
PLAIN: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "scoring": ScoringConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
}
"""Sections that are the core's alone."""
PLUGINS: dict[str, type] = {
    "sampler": PluginConfig,
    "reward": RewardConfig,
    "surrogate": SurrogateConfig,
    "algorithm": PluginConfig,
    "regulariser": RegulariserConfig,
}
"""Sections whose `name` picks a plugin of that kind."""


def require(**demands: tuple[Any, bool, str]) -> None:
    """Raise ValueError with one line for each `name=(found, whether it is fine, what was expected)` that is not."""
    wrong = [f"{name}: found {found}, expected {text}" for name, (found, fine, text) in demands.items() if not fine]
    if wrong:
        raise ValueError(*wrong)


def or_more(value: float, bound: int) -> tuple[float, bool, str]:
    return value, bound <= value < math.inf, f"{bound} or more" + ", and finite" * (value == math.inf)


def above_zero(value: float) -> tuple[float, bool, str]:
    return value, 0 < value < math.inf, "more than 0" + ", and finite" * (value == math.inf)


def finite(value: Any) -> tuple[Any, bool, str]:
    return value, not isinstance(value, float) or math.isfinite(value), "a finite number"
