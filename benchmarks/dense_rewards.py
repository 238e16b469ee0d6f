"""Correlation of SDPO's rewards of single steps with the reward of the finished image.

    python benchmarks/dense_rewards.py [--prompts 100]

Nothing is trained. Two pairs of trajectories are sampled for each of the first training prompts, as in table `turbo` of
compare_methods.py (shapes_turbo, `ddim` with `eta` 1, eight steps), and every predicted clean latent is scored. For
each step, over all pairs:

- `mean`: mean reward of the prediction;
- `reward`: correlation of the difference between the two trajectories of a pair in this reward and in the last reward;
- `advantage`: the same for the quantity that SDPO learns from, with its three queries and with all: discounted returns
  of dense rewards, normalised by the four trajectories of the prompt at that step. 1 would be DDPO's advantage, which
  uses only the last reward; anything less is noise as far as finished images are concerned.
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

TRAJECTORIES, PART = 4, 20
"""Trajectories per prompt, and prompts per batch."""


def differences(values: Tensor) -> Tensor:
    """Return the differences (N / 2, K) within the pairs of trajectories with `values` (N, K)."""
    return values[::2] - values[1::2]


def normalised(values: Tensor) -> Tensor:
    """Normalise the values (N, K) of trajectories by those of the same prompt and step."""
    groups = values.view(-1, TRAJECTORIES, values.shape[1])
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, correction=0, keepdim=True) + 1e-6)).view_as(
        values
    )


def correlation(one: Tensor, other: Tensor) -> str:
    """Return the correlation of two columns (N,) as text; "-" if one of them is constant."""
    found = float(torch.corrcoef(torch.stack([one, other]))[0, 1])
    return f"{found:.2f}" if found == found else "-"


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--prompts", type=int, default=100)
options = parser.parse_args()
settings = {"sampler.name": "ddim", "sampler.eta": 1.0, "sampler.num_steps": 8}
run = alignkit.load(None, {"model.name": "shapes_turbo", "algorithm.name": "sdpo", **settings})
policy, sampler, method, generator = run.policy(), run.sampler(), SDPO(), torch.Generator().manual_seed(0)
rewards: dict[str, Reward] = {
    "attribute_binding": AttributeBinding(judge=str(WEIGHTS / "judge"), mode="soft"),
    "jpeg_compressibility": JpegCompressibility(),
}
for reward in rewards.values():
    reward.load(policy.device)
repeated = [example for example in run.prompts()[: options.prompts] for _ in range(TRAJECTORIES)]
latents: list[Tensor] = []
scores: dict[str, list[Tensor]] = {name: [] for name in rewards}
for start in range(0, len(repeated), TRAJECTORIES * PART):
    examples = repeated[start : start + TRAJECTORIES * PART]
    noise = torch.randn((len(examples), sampler.num_steps + 1, *policy.latent_shape), generator=generator)
    noise[1::2, 0] = noise[::2, 0]  # both of a pair start from the same noise
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
        step = queried_steps(clean, queries, method.anchor, generator)
        dense = by_similarity(clean, step, values.gather(1, step))
        advantages.append(differences(normalised(discounted_returns(dense, method.discount))))
    last = differences(normalised(values))[:, -1]
    table = Table("step", "mean", "reward", "advantage, three", "advantage, all", title=name)
    for k, mean in enumerate(values.mean(0).tolist()):
        columns = [
            correlation(differences(values)[:, k], differences(values)[:, -1]),
            *(correlation(a[:, k], last) for a in advantages),
        ]
        table.add_row(str(k + 1), f"{mean:.3f}", *columns)
    Console().print(table)
