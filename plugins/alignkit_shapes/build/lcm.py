"""Stage 3: the few-step model, distilled from the teacher by alignkit's own `lcd`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from rich.console import Console

import alignkit
from alignkit_shapes.build.teacher import SCHEDULE, unet
from alignkit_shapes.models import WIDE

GUIDANCE = 2.0
"""w of the embedding while sampling; diffusers' guidance_scale is one more."""
W_MIN, W_MAX = 1.0, 3.0


def student(teacher: Path, out: Path) -> None:
    """The teacher with a guidance embedding and the LCM scheduler, not distilled yet."""
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


LEGS = ((500, 3e-4, 0), (300, 1e-4, 0), (300, 3e-4, 32))
"""Updates, learning rate and LoRA's rank, 0 for all weights."""


def train(
    teacher: Path, out: Path, run: Path, legs: Sequence[tuple[int, float, int]] = LEGS, rows: int = 64, seed: int = 3
) -> None:
    """Distil into `out` leg by leg, with the runs kept beside `run`; an interrupted run is resumed.

    At the first rate alone, pictures of several steps get worse again after some 250 updates while those of one step
    still improve; the second, smaller rate brings them back. Faint specks on the ground stay; the third leg, a LoRA at
    the first rate, takes them away and is merged into the weights.
    """
    start = run.with_name(run.name + "-start")
    if not start.exists():
        student(teacher, start)
    for leg, (updates, lr, rank) in enumerate(legs, start=1):
        folder, result = run.with_name(f"{run.name}-{leg}"), out.with_name(f"{out.name}-{leg}")
        _distil(teacher, start, folder, updates, rows, lr, rank, seed + leg)
        pipe = LatentConsistencyModelPipeline.from_pretrained(start)
        if rank:
            pipe.load_lora_weights(folder)
            pipe.fuse_lora()
            pipe.unload_lora_weights()
        else:
            pipe.unet = UNet2DConditionModel.from_pretrained(folder / "unet")
        pipe.save_pretrained(result)
        start = result
    shutil.copytree(start, out, dirs_exist_ok=True)


def _distil(
    teacher: Path, start: Path, run: Path, updates: int, rows: int, lr: float, lora_rank: int, seed: int
) -> None:
    """One run of `lcd` on the model at `start`, on all its weights if `lora_rank` is 0."""
    prompts = Path(__file__).parents[1] / "prompts"
    if run.exists():
        job = alignkit.load(resume=run)
    else:
        job = alignkit.load(
            None,
            {
                "model.name": str(start), "model.teacher": str(teacher), "model.lora_rank": lora_rank,
                "model.lora_targets": WIDE, "model.guidance": GUIDANCE,
                "sampler.name": "lcm", "algorithm.name": "lcd", "algorithm.w_min": W_MIN, "algorithm.w_max": W_MAX,
                "reward": ["shapes_reading"], "data.pictures": "alignkit_shapes.data:Drawings",
                "data.prompts": str(prompts / "train.txt"), "evaluate.prompts": str(prompts / "held_out.txt"),
                "evaluate.limit": 60, "evaluate.every": 0, "evaluate.batch_size": 50, "train.updates": updates,
                "train.rows_per_update": rows, "train.rows_per_pass": rows, "train.learning_rate": lr,
                "train.ema_decay": 0.99, "train.checkpoint_every": 100, "seed": seed, "output": str(run),
            },
        )  # fmt: skip
    for _ in job.train(Console(width=140)):
        pass
