"""Stage 5: the turbo model, a low-rank update of the packed teacher for one to eight steps.

The teacher's guided trajectories of eight steps are sampled once. From every latent of a trajectory the student learns
to predict its end point, without guidance. This distils the teacher's whole solution into a single prediction.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignkit import Policy, PolicySettings, Prompt, diffusion
from alignkit.config.bundles import find_policy
from alignkit.distillation import pseudo_huber
from alignkit.rollout import run_sampler
from alignkit_samplers.ddim import DDIM
from alignkit_shapes.build.teacher import SCHEDULE
from alignkit_shapes.scenes import caption, sample_scene

GUIDANCE_SCALE = 3.0
"""Guidance scale of the teacher's trajectories; the student uses no guidance."""
SAMPLER = DDIM(8, eta=0.0)
"""Its times 999, 874, ..., 124 include those of 1, 2, 4 and 8 trailing steps."""
TARGETS = [
    "to_q", "to_k", "to_v", "to_out.0", "proj", "net.2", "proj_in", "proj_out", "time_emb_proj", "linear_1", "linear_2",
    "conv_in", "conv_out", "conv1", "conv2", "conv", "conv_shortcut",
]  # fmt: skip
"""Every layer of the UNet except its norms, because the update also turns velocity into noise prediction."""
SHARES = torch.tensor([0.4, 0.05, 0.15, 0.05, 0.15, 0.05, 0.1, 0.05])
"""Sampling probability of each time; half of the times belong to four steps and fewer."""
STRAIGHT = 0.3
"""Share of latents after the first step that are the noised end point instead of the trajectory's own latent."""
HUBER_C = 0.03


def build(teacher: Path, work: Path, out: Path) -> None:
    """Run the stage: sample the trajectories into `work`, and distil into `out`."""
    collect(teacher, work)
    train(teacher, work, out)


def collect(teacher: Path, pool: Path, shards: int = 20, rows: int = 512, batch: int = 64, seed: int = 6) -> None:
    """Write `shards` files of `rows` trajectories each, except those that exist.

    Each holds latents (N, 8, 4, 8, 8), end points (N, 4, 8, 8) and text features.
    """
    settings = PolicySettings(trainable=False, guidance_scale=GUIDANCE_SCALE)
    policy = find_policy(str(teacher)).load(str(teacher), settings)
    pool.mkdir(parents=True, exist_ok=True)
    start = time.time()
    for shard in range(shards):
        file = pool / f"{shard:03}.safetensors"
        if file.exists():
            continue
        rng, generator = np.random.default_rng([seed, shard]), torch.Generator().manual_seed(1000 * seed + shard)
        parts = []
        for _ in range(rows // batch):
            prompt = policy.encode([caption(sample_scene(rng), rng) for _ in range(batch)])
            noises = torch.randn((batch, SAMPLER.num_steps + 1, *policy.latent_shape), generator=generator)
            with torch.no_grad():
                rollout = run_sampler(policy, SAMPLER, prompt, noises)
            parts.append({"states": rollout.states, "ends": rollout.clean[:, -1], "features": prompt.features})
        tensors = {name: torch.cat([part[name] for part in parts]).half() for name in parts[0]}
        save_file(tensors, file)
        print(f"trajectories {(shard + 1) * rows} {time.time() - start:.0f} s", flush=True)


class Trajectories:
    """The teacher's trajectories, from which training rows are sampled."""

    def __init__(self, pool: Path) -> None:
        shards = [load_file(file) for file in sorted(pool.glob("*.safetensors"))]
        self.states, self.ends, self.features = (
            torch.cat([shard[name] for shard in shards]) for name in ("states", "ends", "features")
        )

    def batch(self, rows: int, policy: Policy, generator: torch.Generator) -> tuple[Tensor, Tensor, Prompt, Tensor]:
        """Return latents (N, 4, 8, 8), steps (N,), prompts, and end points (N, 4, 8, 8) of the trajectories.

        After the first step some of the latents are the end point with the trajectory's initial noise: the state that
        Euler's method reaches after a correct prediction.
        """
        row = torch.randint(len(self.ends), (rows,), generator=generator)
        k = torch.multinomial(SHARES, rows, replacement=True, generator=generator)
        end, first = self.ends[row].float(), self.states[row, 0].float()
        noised = diffusion.add_noise(end, first, *policy.schedule(SAMPLER.grid(policy)[k]))
        straight = (torch.rand(rows, generator=generator) < STRAIGHT) & (k > 0)
        x = torch.where(diffusion.columns(straight, end), noised, self.states[row, k].float())
        return x, k, Prompt(self.features[row].float(), torch.arange(rows)), end


def train(
    teacher: Path,
    pool: Path,
    out: Path,
    updates: int = 1450,
    rows: int = 64,
    rank: int = 9,
    lr: float = 3e-3,
    seed: int = 7,
) -> None:
    """Distil, and write the LoRA of the averaged weights to `out` every 250 updates.

    It is written in float16, with the scheduler's config. The loss is the pseudo-Huber distance of clean latents, in
    which an error of the predicted noise is scaled by sigma / alpha, 15 at the first step. The loss is multiplied by
    sqrt(alpha / sigma), so that the root of this factor remains.
    """
    torch.manual_seed(seed)
    settings = PolicySettings(prediction="epsilon", guidance_scale=1.0, lora_rank=rank, lora_targets=TARGETS)
    policy = find_policy(str(teacher)).load(str(teacher), settings)
    trajectories, generator = Trajectories(pool), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=updates, pct_start=0.05)
    averages = {name: p.detach().clone() for name, p in policy.weights().items()}
    start, smooth = time.time(), torch.full((SAMPLER.num_steps,), torch.nan)
    for update in range(updates):
        x, k, prompt, end = trajectories.batch(rows, policy, generator)
        t = SAMPLER.grid(policy)[k]
        alpha, sigma = policy.schedule(t)
        distance = pseudo_huber(policy.denoise(x, t, prompt) - end, HUBER_C).flatten(1).mean(1)
        loss = ((alpha / sigma).sqrt() * distance).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.995, (update + 1) / (update + 10))
        torch._foreach_lerp_(list(averages.values()), [p.detach() for p in policy.parameters()], 1 - decay)
        for step in k.unique():
            mean = distance.detach()[k == step].mean()
            smooth[step] = mean if smooth[step].isnan() else 0.95 * smooth[step] + 0.05 * mean
        if update % 50 == 0 or update == updates - 1:
            by_step = " ".join(f"{value:.3f}" for value in smooth.tolist())
            print(f"turbo {update} distance {by_step} {time.time() - start:.0f} s", flush=True)
        if update % 250 == 249 or update == updates - 1:
            file = policy.export(out, averages)
            save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
            scheduler().save_pretrained(out / "scheduler")


def scheduler() -> EulerDiscreteScheduler:
    """Return SD-Turbo's scheduler with the teacher's noise levels: Euler, trailing times, noise prediction."""
    return EulerDiscreteScheduler(
        beta_schedule=SCHEDULE["beta_schedule"], beta_start=SCHEDULE["beta_start"], beta_end=SCHEDULE["beta_end"],
        prediction_type="epsilon", timestep_spacing="trailing", steps_offset=1,
    )  # fmt: skip
