"""A training loop of your own from the public parts: best-of-n distillation in one file.

Sample n images of each prompt, keep the one with the highest reward, and teach the model to predict its clean latent at
every step of the sampler. It shows how policy, sampler, rollout and reward fit together; it is not a tuned method.

    python examples/own_loop.py --updates 50
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import alignkit
from alignkit import diffusion
from alignkit.rollout import encode_examples, run_sampler

parser = argparse.ArgumentParser()
parser.add_argument("--updates", type=int, default=50)
parser.add_argument("--prompts", type=int, default=8, help="prompts of each update")
parser.add_argument("--out", type=Path, default=Path("runs/own_loop"))
options = parser.parse_args()
PROMPTS, N = options.prompts, 6

# A run builds its parts from a run file or from settings; nothing has to train through it.
run = alignkit.load(overrides={"model.name": "shapes_lcm", "reward": ["attribute_binding"], "evaluate.rewards": []})
generator = torch.Generator().manual_seed(0)
torch.manual_seed(0)  # for the initial weights of the LoRA
policy, sampler, examples, rewards = run.policy(), run.sampler(2), run.prompts(), run.with_measured()
rewards.load(policy.device)
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn((*shape, *policy.latent_shape), generator=generator).to(policy.device)


for update in range(options.updates):
    chosen = torch.randperm(len(examples), generator=generator)[:PROMPTS].tolist()
    repeated = [examples[i] for i in chosen for _ in range(N)]
    prompt = encode_examples(policy, repeated)
    with torch.no_grad():
        samples = run_sampler(policy, sampler, prompt, noise(PROMPTS * N, sampler.num_steps + 1)).samples
        scores = rewards.score(policy.decode(samples), repeated, chunk=32)
    groups = scores.values.nan_to_num(nan=-torch.inf).view(PROMPTS, N)
    best = groups.argmax(1).cpu() + torch.arange(PROMPTS) * N

    loss = torch.zeros((), device=policy.device)
    for t in sampler.grid(policy):
        times = t.expand(PROMPTS).to(policy.device)
        noised = diffusion.add_noise(samples[best], noise(PROMPTS), *policy.schedule(times))
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
