"""Change of a model's predictions by training, at each step of a trajectory.

    python benchmarks/movement.py RUN [RUN ...] [--steps 4] [--prompts 200]

The model before training samples a trajectory of `--steps` steps for each of the first training prompts; both models
predict at every latent of it. The table shows root mean squares over all numbers, of the difference in the noise and in
the clean latent: an error of the noise is scaled by sigma / alpha in the clean latent, most at the start of a
trajectory. The weights that a run exports are used.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Column, Table

from alignkit import diffusion
from alignkit.rollout import run_sampler, seeded_noises
from alignkit.runs.run import open_run

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder")
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--prompts", type=int, default=200)
options = parser.parse_args()
table = Table(Column("run", overflow="fold"), "time", "sigma / alpha", "noise moved", "clean latent moved")
for folder in options.runs:
    run = open_run(folder)
    policy, sampler = run.policy(), run.sampler(options.steps)
    prompt = policy.encode([example.text for example in run.prompts()[: options.prompts]])
    noises = seeded_noises(policy.latent_shape, options.steps, [(0, i) for i in range(len(prompt))])
    with torch.no_grad():
        with policy.reference():
            rollout = run_sampler(policy, sampler, prompt, noises)
        for k, time in enumerate(sampler.grid(policy).tolist()):
            x, t = rollout.states[:, k], torch.full((len(prompt),), time)
            alpha, sigma = policy.schedule(t)
            with policy.reference():
                before = policy.denoise(x, t, prompt)
            with policy.using(run.weights):
                now = policy.denoise(x, t, prompt)
            moved = now - before
            noise = diffusion.to_noise(now, x, alpha, sigma) - diffusion.to_noise(before, x, alpha, sigma)
            sizes = [f"{float(d.square().mean().sqrt()):.4f}" for d in (noise, moved)]
            table.add_row(folder if k == 0 else "", str(time), f"{float(sigma[0] / alpha[0]):.1f}", *sizes)
Console().print(table)
