"""A loop of your own from the public parts: best-of-n distillation in one file.

For each prompt draw n images, keep the one that the reward likes best, and teach the model to predict its clean
latent at every step of the sampler. It shows how policy, sampler, walk and reward fit together; it is no tuned method.

    python examples/own_loop.py --updates 50
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from alignkit import diffusion
from alignkit.data.prompts import read_examples
from alignkit.data.stream import Stream, examples_at
from alignkit.models.diffusers_policy import DiffusersPolicy
from alignkit.rewards.weighted import WeightedRewards
from alignkit.rollout import run_sampler
from alignkit_rewards.attribute_binding import AttributeBinding
from alignkit_samplers.lcm import LCM
from alignkit_shapes.models import WEIGHTS, shapes_lcm

parser = argparse.ArgumentParser()
parser.add_argument("--updates", type=int, default=50)
parser.add_argument("--out", type=Path, default=Path("runs/own_loop"))
options = parser.parse_args()
PROMPTS, N = 8, 6

torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)
bundle = shapes_lcm()
policy = DiffusersPolicy(bundle.path, lora_rank=16, guidance_scale=bundle.defaults["model"]["guidance_scale"])
sampler = LCM(num_steps=2)
rewards = WeightedRewards([("attribute_binding", 1.0, AttributeBinding(judge=str(WEIGHTS / "judge")))])
rewards.load(policy.device)
examples = read_examples(bundle.defaults["data"]["prompts"])
stream = Stream(len(examples), seed=0)
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)

for update in range(options.updates):
    batch = examples_at(examples, stream, update * PROMPTS, PROMPTS)
    repeated = [example for example in batch for _ in range(N)]
    prompt = policy.encode([example.text for example in repeated])
    noises = torch.randn((PROMPTS * N, sampler.num_steps + 1, *policy.latent_shape), generator=generator)
    with torch.no_grad():
        samples = run_sampler(policy, sampler, prompt, noises).next_states[:, -1]  # (PROMPTS * N, *S)
        scores = rewards.score(policy.decode(samples), repeated, chunk=32)
    groups = scores.values.nan_to_num(nan=-torch.inf).view(PROMPTS, N)
    best = groups.argmax(1) + torch.arange(PROMPTS) * N

    loss = torch.zeros(())
    for t in sampler.grid(policy):
        times = t.expand(PROMPTS)
        noise = torch.randn((PROMPTS, *policy.latent_shape), generator=generator)
        noised = diffusion.add_noise(samples[best], noise, *policy.schedule(times))
        clean = policy.denoise(noised, times, prompt.select(best))
        loss = loss + (clean - samples[best]).square().mean() / sampler.num_steps
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    means = f"reward {scores.values.nanmean():.3f}, best of {N} {groups.amax(1).mean():.3f}"
    print(f"update {update + 1}: {means}, loss {loss.item():.4f}")

options.out.mkdir(parents=True, exist_ok=True)
print(policy.export(options.out, policy.weights()))
