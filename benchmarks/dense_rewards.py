"""What SDPO's rewards of single steps have to do with that of the finished image.

    python benchmarks/dense_rewards.py [--prompts 100]

Nothing is trained. Two pairs of walks for each of the first training prompts, as table `turbo` of compare_methods.py
draws them (shapes_turbo, `ddim` with `eta` 1, eight steps), with every predicted clean latent scored. For each step,
over all pairs:

- `mean`: of the prediction's reward;
- `reward`: correlation of the difference between the walks of a pair in this reward and in the last;
- `advantage`: the same for what SDPO learns from, with its three queries and with all: discounted returns of dense
  rewards, measured by the four walks of the prompt at that step. 1 would be an advantage as DDPO has it, of the last
  reward alone; the rest is chance as far as finished images are concerned.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import alignkit
from alignkit.interfaces import Reward
from alignkit.rewards.weighted import quantize
from alignkit.rollout import run_sampler
from alignkit_rewards.attribute_binding import AttributeBinding
from alignkit_rewards.jpeg import JpegCompressibility
from alignkit_sdpo.algorithm import SDPO
from alignkit_sdpo.dense import by_similarity, discounted_returns, queried_steps
from alignkit_shapes.models import WEIGHTS

WALKS, PART = 4, 20
"""Walks of a prompt, and prompts at once."""


def apart(values: Tensor) -> Tensor:
    """(N, K) of walks to the differences of the pairs (N / 2, K)."""
    return values[::2] - values[1::2]


def own(values: Tensor) -> Tensor:
    """(N, K) of walks, measured by those of the same prompt and step."""
    groups = values.view(-1, WALKS, values.shape[1])
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, correction=0, keepdim=True) + 1e-6)).view_as(
        values
    )


def correlation(one: Tensor, other: Tensor) -> str:
    """Of two columns (N,); none if one of them is all alike."""
    found = float(torch.corrcoef(torch.stack([one, other]))[0, 1])
    return f"{found:.2f}" if found == found else "-"


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--prompts", type=int, default=100)
options = parser.parse_args()
walks = {"sampler.name": "ddim", "sampler.eta": 1.0, "sampler.num_steps": 8}
run = alignkit.load(None, {"model.name": "shapes_turbo", "algorithm.name": "sdpo", **walks})
policy, sampler, method, chance = run.policy(), run.sampler(), SDPO(), torch.Generator().manual_seed(0)
rewards: dict[str, Reward] = {
    "attribute_binding": AttributeBinding(judge=str(WEIGHTS / "judge"), mode="soft"),
    "jpeg_compressibility": JpegCompressibility(),
}
for reward in rewards.values():
    reward.load(policy.device)
asked = [example for example in run.prompts()[: options.prompts] for _ in range(WALKS)]
latents: list[Tensor] = []
scores: dict[str, list[Tensor]] = {name: [] for name in rewards}
for start in range(0, len(asked), WALKS * PART):
    examples = asked[start : start + WALKS * PART]
    noise = torch.randn((len(examples), sampler.num_steps + 1, *policy.latent_shape), generator=chance)
    noise[1::2, 0] = noise[::2, 0]  # a pair starts from one
    with torch.no_grad():
        clean = run_sampler(policy, sampler, policy.encode([e.text for e in examples]), noise).clean
        images = quantize(policy.decode(clean.flatten(0, 1)))
        for name, reward in rewards.items():
            found = reward(images, [e for e in examples for _ in range(sampler.num_steps)])
            values = found if isinstance(found, Tensor) else found.values
            scores[name].append(values.view(len(examples), -1))
    latents.append(clean)
clean = torch.cat(latents)
for name in rewards:
    values = torch.cat(scores[name])
    advantages = []
    for queries in ("three", "all"):
        step = queried_steps(clean, queries, method.anchor, chance)
        dense = by_similarity(clean, step, values.gather(1, step))
        advantages.append(apart(own(discounted_returns(dense, method.discount))))
    last = apart(own(values))[:, -1]
    table = Table("step", "mean", "reward", "advantage, three", "advantage, all", title=name)
    for k, mean in enumerate(values.mean(0).tolist()):
        columns = [
            correlation(apart(values)[:, k], apart(values)[:, -1]),
            *(correlation(a[:, k], last) for a in advantages),
        ]
        table.add_row(str(k + 1), f"{mean:.3f}", *columns)
    Console().print(table)
