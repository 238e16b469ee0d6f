"""Tables and methods that compare_methods.py compares, and the settings of each run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from alignkit_shapes.models import WIDE

Settings = dict[str, Any]

TUNING_SEED = 100
NEVER = 10**9
"""Number of updates that is never reached: the number of samples ends the run."""


@dataclass(frozen=True)
class Method:
    """A method with its settings in one table."""

    algorithm: str
    samples_per_prompt: str
    """Samples per prompt in one round: the algorithm's field with this number, "2 pairs" for pairs of trajectories, or
    "rows" if the samples are the predictions for the rows of an update."""
    settings: Settings = field(default_factory=dict)
    free_rounds: int = 0
    """Rounds at the start that generate no samples."""
    samples: int = 0
    """Samples of each run; 0: those of the table."""
    rate: float = 0.0
    """Learning rate of each run, without tuning; 0: chosen from the table's grid."""


@dataclass(frozen=True)
class Table:
    """One comparison."""

    name: str
    title: str
    paper: str
    settings: Settings
    steps: tuple[int, ...]
    samples: int
    """Samples of each run."""
    rates: tuple[float, ...]
    methods: Mapping[str, Method]
    images: int = 2
    """Images per prompt in the final evaluation."""


# LaSRO's paper combines its baselines with the distillation loss.
_distilled: Settings = {"regulariser": ["lcd"]}
_rows: Settings = {"train.rows_per_update": 32, "train.rows_per_pass": 128, "train.ema_decay": 0.95}
_two_steps: Settings = {
    "model.name": "shapes_lcm", "sampler.name": "lcm", "sampler.num_steps": 2, "data.batch_size": 16, **_rows,
}  # fmt: skip
# The same methods as in their own papers.
_undistilled = {
    "RLCM, no distillation": Method("ddpo", "samples", {"algorithm.samples": 4}),
    "PSO, no distillation": Method("pso", "2 pairs", {"algorithm.pairs": 2}),
}
_gors_lcm = Method("gors_lcm", "samples", {"algorithm.samples": 4})
# 40 rounds, slightly more than the 32 of the model's defaults; its batch size sets the number of samples for all.
_lasro = Method("lasro", "samples", {
    "data.batch_size": 48, "train.rows_per_update": 96, "train.rows_per_pass": 48, "train.ema_decay": 0.96,
})  # fmt: skip
_proxy: Settings = {"algorithm.proxy": True, "surrogate.warmup": 100}
_taught_first: Settings = {
    "algorithm.proxy": True, "algorithm.beta": 3.0, "algorithm.pretraining": 800, "algorithm.proxy_rows": 32,
    "algorithm.expert_temperature": 0.2, "surrogate.warmup": 1200, "surrogate.learning_rate": 3e-4,
    "surrogate.latent_groups": 5,
}  # fmt: skip
_eight_steps: Settings = {
    "model.name": "shapes_turbo", "sampler.name": "ddim", "sampler.eta": 1.0, "sampler.num_steps": 8,
    "data.batch_size": 16, **_rows,
}  # fmt: skip
_by_likelihood = {
    "D3PO": Method("d3po", "2 pairs", {"algorithm.pairs": 2, "train.rows_per_update": 64}),
    "DDPO": Method("ddpo", "samples", {"algorithm.samples": 4, "train.rows_per_update": 128}),
    "REBEL": Method("rebel", "2 pairs", {"algorithm.pairs": 2, "train.rows_per_update": 8, "train.rows_per_pass": 8}),
    "SDPO": Method("sdpo", "2 pairs", {"algorithm.pairs": 2, "train.rows_per_pass": 64}),
}


def _longer(name: str, **fields: Any) -> Method:
    """Return the method with four times the samples, and with these fields changed."""
    method = _by_likelihood[name]
    settings = {**method.settings, **{f"algorithm.{field}": value for field, value in fields.items()}}
    return replace(method, samples=10240, rate=3e-4, settings=settings)


_tables = [
    Table(
        "lcm",
        "Two steps of a latent consistency model",
        "LaSRO (2411.15247), Table 1",
        _two_steps,
        steps=(1, 2),
        samples=3840,
        rates=(1e-4, 3e-4, 1e-3),
        methods={
            "RLCM (ddpo)": Method("ddpo", "samples", {"algorithm.samples": 4, **_distilled}),
            "PSO": Method("pso", "2 pairs", {"algorithm.pairs": 2, **_distilled}),
            **_undistilled,
            # The model's defaults for LaSRO have an adapter with more layers; this is DDPO with the same adapter.
            "RLCM, wide adapter": Method("ddpo", "samples", {"algorithm.samples": 4, "model.lora_targets": WIDE}),
            "GORS-LCM": _gors_lcm,
            # The control for the methods that combine distillation with a reward.
            "distillation alone": Method("lcd", "rows"),
            "LaSRO": _lasro,
        },
        images=3,
    ),
    Table(
        "lcm_size",
        "Two steps of a latent consistency model, for the size of an image's file",
        "LaSRO (2411.15247), Table 1, with a reward that RLCM (2404.03673) is shown on",
        {**_two_steps, "reward": ["jpeg_compressibility"]},
        steps=(1, 2),
        samples=3840,
        rates=(1e-4, 3e-4, 1e-3),
        # The shipped surrogate was trained on another reward; LaSRO trains one from scratch, within its samples.
        methods={
            **_undistilled,
            "GORS-LCM": _gors_lcm,
            "LaSRO": _lasro,
        },
        images=3,
    ),
    Table(
        "turbo",
        "Few steps after training at many",
        "SDPO (2411.11727), Table 1",
        # At eight steps most hard answers are correct, so that the trajectories of a prompt would tie.
        {**_eight_steps, "reward": [{"name": "attribute_binding", "mode": "soft"}]},
        steps=(1, 2, 4, 8, 16),
        samples=2560,
        rates=(3e-4, 1e-3),
        methods={
            **_by_likelihood,
            # These test whether more samples help.
            "DDPO for longer": _longer("DDPO"),
            "SDPO for longer": _longer("SDPO"),
            # These test the rewards of intermediate predictions, and the interpolation between the queried ones.
            "SDPO for longer, last reward": _longer("SDPO", queries="one"),
            "SDPO for longer, every reward": _longer("SDPO", queries="all"),
        },
    ),
    Table(
        "size",
        "Few steps after training at many, for the size of an image's file",
        "SDPO (2411.11727), Table 1, with the reward that DDPO (2305.13301) began with",
        {**_eight_steps, "reward": ["jpeg_compressibility"]},
        steps=(1, 2, 4, 8, 16),
        samples=1280,
        rates=(3e-4, 1e-3),
        # D3PO drifts much further than the others at the rate with the best reward, and less at the next lower one.
        methods={
            **_by_likelihood,
            "D3PO more slowly": replace(_by_likelihood["D3PO"], rate=3e-4),
            "D3PO in between": replace(_by_likelihood["D3PO"], rate=5.5e-4),
        },
    ),
    Table(
        "rg_lcd",
        "Distillation guided by a reward",
        "RG-LCD (2403.11027), Table 1",
        # Hard answers have no gradient.
        {
            "model.name": "shapes_lcm", "sampler.name": "lcm", "sampler.num_steps": 2,
            "reward": [{"name": "attribute_binding", "mode": "soft"}], **_rows,
        },
        steps=(1, 2, 4),
        samples=3840,
        rates=(1e-4, 3e-4),
        methods={
            # With the same target as RG-LCD.
            "LCM, distilled on": Method("lcd", "rows", {"algorithm.target_decay": 0.95}),
            "RG-LCD": Method("rg_lcd", "rows", {"algorithm.beta": 1.0}),
            "RG-LCD, proxy": Method("rg_lcd", "rows", {"algorithm.beta": 1.0, **_proxy}, free_rounds=100),
            # The proxy is trained for 400 rounds on the expert's preferences before the policy follows it.
            "RG-LCD, proxy taught first": Method(
                "rg_lcd", "rows", _taught_first, free_rounds=800, samples=3840 + 400 * 32, rate=3e-4
            ),
        },
    ),
    Table(
        "offline",
        "From pairs that are given",
        "none; PSO (2410.03190) reports its offline form next to Diffusion-DPO",
        # Correct and incorrect drawings of a caption, from the model's defaults.
        {
            "model.name": "shapes_turbo", "sampler.name": "euler_ancestral", "sampler.eta": 0.0,
            "sampler.num_steps": 4, **_rows,
        },
        steps=(1, 2, 4),
        samples=3840,
        rates=(3e-5, 1e-4, 3e-4),
        methods={
            "Diffusion-DPO": Method("diffusion_dpo", "rows"),
            # Includes the first time, where noise prediction sees nothing but noise and so learns nothing. Errors of
            # the velocity are larger, above all at that time.
            "Diffusion-DPO, velocity": Method("diffusion_dpo", "rows", {
                "algorithm.space": "velocity", "algorithm.zero_terminal_snr": False, "algorithm.beta": 250.0,
            }),
            "PSO, offline": Method("pso", "rows", {"algorithm.mode": "offline"}),
        },
    ),
]  # fmt: skip
TABLES = {table.name: table for table in _tables}


def quick(table: Table) -> Table:
    """Return the table for a smoke test: one or two rounds of few samples, two rates, two numbers of steps, one image
    of each prompt."""
    small: Settings = {"data.batch_size": 2, "train.rows_per_update": 8}
    methods = {
        name: replace(
            method,
            settings={**method.settings, **small, **({"surrogate.warmup": 1} if method.free_rounds else {})},
            free_rounds=min(method.free_rounds, 1),
            samples=0,
        )
        for name, method in table.methods.items()
    }
    return replace(table, steps=table.steps[:2], samples=16, rates=table.rates[:2], methods=methods, images=1)


@dataclass(frozen=True)
class Cell:
    """One run of a table; with an empty method, the untrained model."""

    table: Table
    method: str = ""
    rate: float = 0.0
    seed: int = 0
    samples: int = 0
    tuning: bool = False

    @property
    def key(self) -> str:
        """Name of the cell, which is also its folder."""
        if not self.method:
            return f"{self.table.name}/base"
        kind = "tune" if self.tuning else "run"
        name = "".join(c if c.isalnum() else "_" for c in self.method.lower())
        return f"{self.table.name}/{name}/{kind}-{self.rate:g}-seed{self.seed}-{self.samples}"

    def settings(self) -> Settings:
        """Return the run's settings as overrides, without the output."""
        common = {"reward": ["attribute_binding"], **self.table.settings, "seed": self.seed}
        if not self.method:
            return {**common, "algorithm.name": "diffusion_dpo"}  # accepts every sampler; nothing is trained
        method = self.table.methods[self.method]
        loop = {
            "train.updates": NEVER, "train.checkpoint_every": 50, "train.keep_checkpoints": 1,
            "train.learning_rate": self.rate, "evaluate.prompts": "",
        }  # fmt: skip
        return {**common, "algorithm.name": method.algorithm, **method.settings, **loop}


def tuning_cells(table: Table, method: str) -> list[Cell]:
    """Return the runs that choose a method's learning rate; none if the method has a fixed one."""
    if table.methods[method].rate:
        return []
    return [Cell(table, method, rate, TUNING_SEED, table.samples, tuning=True) for rate in table.rates]
