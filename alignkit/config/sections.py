"""The sections of a run file as dataclasses. Those of plugins hold a name and the plugin's own fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, IsFinite, Le, Lt, MinLen

from alignkit.config.ranges import NotNegative, Positive
from alignkit.config.schema import check_ranges
from alignkit.imports import CodeName


@dataclass(frozen=True)
class Section:
    """A section of a run file; its annotated ranges hold however it is built."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class ModelConfig(Section):
    """The model under training, and the part of it that is trained."""

    name: Annotated[str, MinLen(1)] = "shapes_lcm"
    """A registered model (`alignkit list models`), a hub id, a diffusers folder, or a .safetensors file with a whole
    checkpoint."""
    policy: str = ""
    """The policy that loads the model and its teacher (`alignkit list policies`); empty: the one that serves the
    checkpoint."""
    teacher: str = ""
    """A hub id or a folder of the model it was distilled from; empty: that of the registered model."""
    unet: str = ""
    """A UNet that replaces the pipeline's own (SDXL-Lightning, LCM for SDXL): a hub id, a folder, a .safetensors
    file, or owner/name/file.safetensors on the hub."""
    adapter: str = ""
    """A LoRA, DoRA, LoHa or LoKr that is merged into the UNet before anything else (LCM-LoRA, an earlier run), named as
    for unet."""
    variant: str = ""
    """Ending of the files of weights ("fp16" for diffusion_pytorch_model.fp16.safetensors); empty: plain files, or the
    only variant there is."""
    config: str = ""
    """A folder or hub id of a pipeline whose configs and tokenizer a checkpoint of one file takes; empty: those of its
    kind, which come from the hub."""
    allow_pickle: bool = False
    """Whether weights may be read from pickled files (.bin, .ckpt) too. Only tensors are unpickled."""
    prediction: Literal["", "epsilon", "v_prediction", "sample", "consistency"] = ""
    """Prediction type of the network where unet or adapter changed it; "consistency" is an LCM. Empty: as the
    pipeline's scheduler says."""
    lora_rank: Annotated[int, Ge(0)] = 16
    """Rank of the LoRA adapter; 0 trains all weights."""
    guidance_embedding: int = 0
    """Width of an input for the guidance that the network is given (256 in published models), for distilling a model of
    many steps into a latent consistency model; takes prediction = "consistency" and lora_rank = 0.
    0: leave the network unchanged."""
    lora_targets: list[str] = field(default_factory=list)
    """Names of the layers to adapt, as peft understands them; empty: the attention projections."""
    guidance_scale: IsFinite[float] | None = None
    """Guidance scale while sampling, as in diffusers: 1 or less is the conditional prediction; left out: what suits the
    model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        width, widened = self.guidance_embedding, self.prediction == "consistency" and not self.lora_rank
        if width and not (widened and width >= 4 and width % 2 == 0):
            raise ValueError(
                f'guidance_embedding: found {width}, expected 0, or with prediction = "consistency" and lora_rank = 0 '
                "an even number from 4 on"
            )


@dataclass(frozen=True)
class DataConfig(Section):
    """The prompts, images and pairs to train on."""

    prompts: str = ""
    """A .txt file with one prompt a line, a .jsonl file of objects with "text" and what the reward needs to know, or a
    .parquet file; or a set that ships with alignkit: animals, attributes, counting or spatial, or one of these with
    _held_out appended."""
    prompt_column: str = ""
    """Column of the prompt in .jsonl and .parquet files; empty: "text", "prompt" or "caption"."""
    images: CodeName = ""
    """Captioned images, for algorithms and regularisers that need them: a folder, a .jsonl file, .tar shards as
    "shards/{0000..0012}.tar", a data set as "datasets:owner/name", or "package.module:Class"."""
    caption_column: str = ""
    """Column of the caption in tables, .json members and data sets; empty: "text", "caption" or "prompt"."""
    pairs: CodeName = ""
    """Preference pairs, for algorithms that need them: a folder with pairs.jsonl (from `alignkit pairs` or `alignkit
    prefer`), a .jsonl file, .parquet in Pick-a-Pic's columns or a folder of it, or "package.module:Class"."""
    on_error: Literal["raise", "skip"] = "raise"
    """Reaction to prompts, images and pairs that are missing or cannot be read: end the run, or leave them out and name
    them."""
    cache: str = ""
    """A folder that keeps the encodings of prompts and images, so that each is made once; empty: none."""
    batch_size: Annotated[int, Ge(1)] = 16
    """Prompts of one round."""


@dataclass(frozen=True)
class PluginConfig(Section):
    """A plugin by name, with all its fields."""

    name: str = ""
    """Name of the plugin; `alignkit list` shows all."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Every field of the plugin's class, those left at their default included."""


@dataclass(frozen=True)
class RewardConfig(PluginConfig):
    """A reward and its share in the sum."""

    weight: IsFinite[float] = 1.0
    """Its factor in the sum of all rewards."""
    at_least: IsFinite[float] | Literal["start"] | None = None
    """Lower bound on its mean: a number, or "start" for the mean over the first rounds (scoring.start_rounds); enforced
    by a Lagrange multiplier that is added to the weight."""


@dataclass(frozen=True)
class ScoringConfig(Section):
    """The calls of rewards, and the combination of several into the value to learn from."""

    combine: Literal["sum", "normalised", "advantage"] = "sum"
    """"sum": the weighted sum of the scores as they are. "normalised": of each score minus its running mean, divided by
    its running standard deviation. "advantage": the weighted sum of the advantages of each reward (GDPO)."""
    statistics_decay: Annotated[float, Gt(0), Le(1)] = 0.99
    """Factor by which the scores of a round count less in the running statistics with each further round; 1 forgets
    nothing."""
    start_rounds: Annotated[int, Ge(1)] = 4
    """Rounds whose mean is the "start" of a reward's at_least, the warm-up of a surrogate included; no bound is
    enforced before they are over."""
    multiplier_rate: Positive = 0.1
    """Growth of a multiplier in one round for each standard deviation that the mean of the reward lies too low."""
    on_error: Literal["raise", "skip"] = "raise"
    """Reaction to a score that is NaN or infinite: end the run and name the reward, or count the image as not scored,
    and warn."""
    retries: Annotated[int, Ge(0)] = 4
    """Further calls of a reward after a failure that may pass (a server that does not answer)."""
    retry_seconds: NotNegative = 1.0
    """Wait before the first retry; each further wait is twice as long."""
    retry_limit: Annotated[float, Ge(0)] = 300.0
    """Seconds after which the same images are not tried again, however many retries are left: a bound for servers that
    hang."""
    overlap: bool = True
    """Whether slow rewards answer in threads of their own while the next images are generated or decoded. It changes no
    result."""
    cache: str = ""
    """A file that keeps the scores of slow black boxes, to share between runs; empty: scores.sqlite in the run
    folder."""


@dataclass(frozen=True)
class SurrogateConfig(PluginConfig):
    """A learned stand-in for the reward, and its training."""

    init: str = ""
    """A run folder or a .safetensors file to start from; empty: the plugin's own initialisation."""
    warmup: Annotated[int, Ge(0)] = 0
    """Rounds that train the surrogate alone, before the first update of the policy."""
    learning_rate: Positive = 1e-4
    """Step size of AdamW."""
    weight_decay: NotNegative = 0.01
    """Weight decay of AdamW."""
    max_grad_norm: Annotated[float, Gt(0)] = 1.0
    """Gradients are scaled down to this norm; inf: never."""

    def untrained(self) -> str:
        """Return a warning where the policy follows the surrogate before it has learned anything; else empty."""
        if self.init or self.warmup:
            return ""
        return (
            f"surrogate: {self.name} begins untrained, and the first updates follow noise; set surrogate.init, or "
            "surrogate.warmup to the rounds in which it learns alone"
        )


@dataclass(frozen=True)
class RegulariserConfig(PluginConfig):
    """A term that is added to the loss of the algorithm."""

    weight: NotNegative = 1.0
    """Its factor in the loss; 0 leaves it out, with all that it needs."""


@dataclass(frozen=True)
class TrainConfig(Section):
    """The training loop."""

    updates: Annotated[int, Ge(0)] = 200
    """Optimizer steps of the policy; 0 evaluates the model as it is."""
    rows_per_update: Annotated[int, Ge(1)] = 32
    """Rows of one optimizer step: a choice of learning."""
    rows_per_pass: Annotated[int, Ge(1)] = 32
    """Rows that go through the network at once: a choice of memory, which changes no result."""
    gradient_checkpointing: bool = False
    """Whether model, teacher and decoder compute their activations again in the backward pass instead of keeping them:
    less memory, more time, the same result."""
    learning_rate: Positive = 1e-4
    """Step size of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: it stays, or falls to 0 at the end of the run."""
    warmup: Annotated[int, Ge(0)] = 0
    """Updates over which the learning rate rises from 0; at most updates."""
    weight_decay: NotNegative = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: Annotated[float, Gt(0)] = 1.0
    """Gradients are scaled down to this norm; inf: never."""
    ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.99
    """Decay of the average of the trained weights, which evaluation and export use; 0: no average."""
    export: Literal["", "best", "average", "last"] = ""
    """The weights that the run exports and evaluates in the end. "best": the average of the point (evaluate.points)
    where the trained reward is highest, as the mean over evaluate.steps, among those where it rose and no held-out
    reward fell beyond its 95 % interval at any number of steps; "average" if there is none. "average": the average of
    the last update. "last": the last update, not averaged. Empty: "best" where there are points, a trained and a
    held-out reward, else "average"."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision; "no" is float32."""
    checkpoint_every: Annotated[int, Ge(0)] = 50
    """Updates between checkpoints; 0: one at the end."""
    keep_checkpoints: Annotated[int, Ge(1)] = 2
    """Number of the newest checkpoints that are kept."""
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    """Trackers that metrics go to, in addition to metrics.jsonl."""
    device: Literal["", "cpu"] = ""
    """Empty: the best there is (CUDA_VISIBLE_DEVICES chooses among GPUs)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup > self.updates:
            raise ValueError(f"warmup: found {self.warmup}, expected 0 to updates, which is {self.updates}")


@dataclass(frozen=True)
class EvaluateConfig(Section):
    """The evaluation on prompts that are not trained on."""

    every: Annotated[int, Ge(0)] = 50
    """Updates between evaluations; 0: only before and after the run."""
    prompts: str = ""
    """A file as for data.prompts."""
    steps: Annotated[list[Annotated[int, Ge(1)]], MinLen(1)] = field(default_factory=lambda: [1, 2, 4])
    """Numbers of sampler steps."""
    limit: Annotated[int, Ge(1)] = 64
    """Prompts used, from the top of the file."""
    samples: Annotated[int, Ge(1)] = 1
    """Images of each prompt, over which its score is the mean: intervals get narrower, and take as much longer."""
    points: Annotated[int, Ge(0)] = 10
    """Points of the run, evenly spaced, the last update one of them, at which one image of each of a few prompts is
    generated at every number of steps, scored and kept in points/ with the weights of the moment (not those of
    lora_rank = 0, which are whole models). The point before training is one more. A round ends before its point is
    measured. 0: none."""
    points_limit: Annotated[int, Ge(1)] = 64
    """Prompts at each point, from the end of the file of prompts: train.export chooses on prompts that are not those of
    the final evaluation if the file has at least limit + points_limit."""
    seed: int = 1000
    """Seed of the noise, the same at every evaluation."""
    rewards: list[str | dict[str, Any]] = field(default_factory=list)
    """Held-out rewards, which are measured and not trained on: names, or tables with a name and fields of the reward,
    which may be written as [[evaluate.rewards]]. A name of a reward that is trained on may stand here as well."""
    batch_size: Annotated[int, Ge(1)] = 32
    """Images that are generated, decoded and scored at once."""

    def unmeasured(self) -> str:
        """Return a warning about `rewards` that are listed and never measured; empty where there are none."""
        if not self.rewards or self.prompts:
            return ""
        names = ", ".join(self.held_out_rewards())
        return f"evaluate.rewards: not measured ({names}), because evaluate.prompts names no held-out prompts"

    def held_out_rewards(self) -> dict[str, dict[str, Any]]:
        """Return the fields of `rewards` by name."""
        tables: list[dict[str, Any]] = [{"name": e} if isinstance(e, str) else e for e in self.rewards]
        return {table["name"]: {k: v for k, v in table.items() if k != "name"} for table in tables}


@dataclass(frozen=True)
class RecipeConfig(Section):
    """The runs that a recipe is for: the table [recipe] of its file."""

    models: list[str] = field(default_factory=list)
    """Registered models that it was made for; empty: any."""
    for_reward: str = ""
    """The reward that it was made for, which must be the only one to train on; empty: any."""


@dataclass(frozen=True)
class RunConfig(Section):
    """A whole run, every default filled in."""

    sampler: PluginConfig
    algorithm: PluginConfig
    rewards: list[RewardConfig]
    regularisers: list[RegulariserConfig] = field(default_factory=list)
    surrogate: SurrogateConfig | None = None
    output: str = ""
    """The run folder; empty: runs/<date>-<algorithm>, with a number appended from the second of a day on."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of all random numbers."""
    recipe: str = ""
    """The recipe whose settings the run takes (`alignkit list recipes`); left out: the one that the model names for the
    algorithm; "paper" or empty: none."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    stated: frozenset[str] | None = field(default=None, compare=False, repr=False)
    """Texts among the settings that the user stated, and not a run file alone; None: all are the user's own."""


TOP: dict[str, Any] = {"output": str, "seed": Annotated[int, Ge(0)], "recipe": str}
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
