"""Stage 3: the few-step model, distilled from the teacher with alignkit's own `lcd`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from rich.console import Console

import alignkit
from alignkit_shapes.build.teacher import SCHEDULE, unet
from alignkit_shapes.models import WIDE

GUIDANCE_SCALE = 3.0
"""Guidance scale for sampling."""
SCALE_MIN, SCALE_MAX = 2.0, 4.0


def student(teacher: Path, out: Path) -> None:
    """Save the teacher with a guidance embedding and the LCM scheduler to `out`, not distilled yet."""
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline.from_pretrained(teacher)
    network = unet(time_cond_proj_dim=256)
    missing, unexpected = network.load_state_dict(pipe.unet.state_dict(), strict=False)
    assert missing == ["time_embedding.cond_proj.weight"] and not unexpected
    schedule = {k: v for k, v in SCHEDULE.items() if k not in ("steps_offset", "timestep_spacing")}
    LatentConsistencyModelPipeline(
        vae=pipe.vae, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer, unet=network,
        scheduler=LCMScheduler(**schedule), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(out)  # fmt: skip


@dataclass(frozen=True)
class Leg:
    """A phase of the distillation, which starts from the result of the previous one."""

    updates: int
    rate: float
    rank: int = 0
    """Rank of a LoRA that is merged into the weights afterwards; 0 trains all weights."""
    targets: Sequence[str] = ()
    """Layers of the LoRA; attention if empty."""
    rows: int = 64
    average: float = 0.99
    runs: int = 1
    """Number of seeds; the mean of their LoRAs is merged."""

    def __post_init__(self) -> None:
        if self.runs > 1 and not self.rank:
            raise ValueError(f"runs is {self.runs}, expected 1 without a LoRA: only LoRAs are averaged")


LEGS = (
    Leg(500, 3e-4),
    Leg(300, 1e-4),
    Leg(300, 3e-4, rank=32, targets=WIDE),
    Leg(120, 2e-4, rank=16, rows=32, average=0.95, runs=3),
)


def train(teacher: Path, out: Path, run: Path, legs: Sequence[Leg] = LEGS, seed: int = 3) -> None:
    """Distil into `out` leg by leg, with the run folders next to `run`; an interrupted run is resumed.

    With only the first rate, images of several steps get worse again after some 250 updates while those of one step
    still improve; the second, smaller rate recovers them. Faint specks on the ground remain; the third leg, a LoRA at
    the first rate, removes them. After that, single runs still improve a little, but each drifts in its own direction,
    so the last leg is the mean of three.
    """
    start = run.with_name(run.name + "-start")
    if not start.exists():
        student(teacher, start)
    for number, leg in enumerate(legs, start=1):
        result = out.with_name(f"{out.name}-{number}")
        folders = [run.with_name(f"{run.name}-{number}-{i}") for i in range(leg.runs)]
        for i, folder in enumerate(folders):
            _distil(teacher, start, folder, leg, seed + number + 10 * i)
        pipe = LatentConsistencyModelPipeline.from_pretrained(start)
        if leg.rank:
            for folder in folders:
                pipe.load_lora_weights(folder, adapter_name=folder.name)
            pipe.set_adapters([folder.name for folder in folders], adapter_weights=[1 / leg.runs] * leg.runs)
            pipe.fuse_lora()
            pipe.unload_lora_weights()
        else:
            pipe.unet = UNet2DConditionModel.from_pretrained(folders[0] / "unet")
        pipe.save_pretrained(result)
        start = result
    shutil.copytree(start, out, dirs_exist_ok=True)


def _distil(teacher: Path, start: Path, run: Path, leg: Leg, seed: int) -> None:
    """Run `lcd` on the model at `start`."""
    prompts = Path(__file__).parents[1] / "prompts"
    if run.exists():
        job = alignkit.load(resume=run)
    else:
        job = alignkit.load(
            None,
            {
                "model.name": str(start), "model.teacher": str(teacher), "model.lora_rank": leg.rank,
                "model.lora_targets": list(leg.targets), "model.guidance_scale": GUIDANCE_SCALE,
                "sampler.name": "lcm", "algorithm.name": "lcd",
                "algorithm.guidance_scale_min": SCALE_MIN, "algorithm.guidance_scale_max": SCALE_MAX,
                "reward": ["pixel_check"], "data.images": "alignkit_shapes.data:Drawings",
                "data.prompts": str(prompts / "train.txt"), "evaluate.prompts": str(prompts / "held_out.txt"),
                "evaluate.limit": 60, "evaluate.every": 0, "evaluate.points": 0, "evaluate.batch_size": 50,
                "train.updates": leg.updates,
                "train.rows_per_update": leg.rows, "train.rows_per_pass": leg.rows, "train.learning_rate": leg.rate,
                "train.ema_decay": leg.average, "train.checkpoint_every": 100, "seed": seed, "output": str(run),
            },
        )  # fmt: skip
    for _ in job.train(Console(width=140)):
        pass
