"""Agreement of gradients in the policy's weights: that of a surrogate with that of the reward it stands for.

    python benchmarks/alignment.py [--at LORA] [--surrogate RUN ...] [--batches 16]

An update follows the mean over many samples of a gradient by weights, and errors of a surrogate that differ from sample
to sample cancel there, while those that samples share do not. So a surrogate whose gradient by a latent hardly agrees
with the reward's may still point the policy the right way, and the other way round. Here shapes_lcm samples two steps
under training prompts, 24 a batch; the gradient of the mean score of both predictions is taken by the weights of a new
LoRA, for the VQA model's soft answers through the decoder, for the shipped surrogate and for those of `--surrogate`,
runs of lasro, under their own prompt and minus that under another prompt (`algorithm.contrast`). `--at` is the folder
of a LoRA, as of a point of a run, at which it is measured; by default the model before training.

`halves` is the cosine of the gradients of two independent halves of the batches: what of them is signal. `agreement` is
the cosine with the gradient of the VQA model in the limit of many samples: that between different halves, divided by
the roots of both `halves`; below zero the policy is led away from the reward. `unit`: each sample's gradient by its
latent has length one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from math import sqrt
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import alignkit
from alignkit import Policy, Prompt, Surrogate
from alignkit.rewards.weighted import quantize
from alignkit.rollout import encode_examples, run_sampler, states_of
from alignkit_rewards.attribute_binding import AttributeBinding
from alignkit_shapes.models import WEIGHTS

PROMPTS = 24
REWARD = "VQA model"


def slope(score: Callable[[Tensor], Tensor], clean: Tensor) -> Tensor:
    """Return the gradient of the scores at latents (N, *S)."""
    point = clean.detach().requires_grad_(True)
    return torch.autograd.grad(score(point).sum(), point)[0]


def unit(gradient: Tensor) -> Tensor:
    return F.normalize(gradient.flatten(1), dim=1).view_as(gradient)


def slopes(
    clean: Tensor, prompt: Prompt, policy: Policy, reward: AttributeBinding, surrogates: Mapping[str, Surrogate]
) -> dict[str, Tensor]:
    """Return the gradients of all scores at predictions (N, *S), by name."""
    other = prompt.select(torch.arange(len(clean)).view(-1, PROMPTS).roll(1, 1).flatten())
    found = {REWARD: slope(lambda x: reward(quantize(policy.decode(x)), prompt.examples).values, clean)}
    for name, surrogate in surrogates.items():
        own, away = (slope(partial(surrogate.score, prompt=p), clean) for p in (prompt, other))
        found |= {name: own, f"{name}, contrast": own - away}
    return found | {f"{name}, unit": unit(gradient) for name, gradient in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", metavar="LORA", help="a folder with a LoRA of shapes_lcm")
    parser.add_argument("--surrogate", metavar="RUN", nargs="*", default=[], help="run folders of lasro")
    parser.add_argument("--batches", type=int, default=16, help="an even number")
    options = parser.parse_args()
    run = alignkit.load(None, {"algorithm.name": "lasro", **({"model.adapter": options.at} if options.at else {})})
    policy, sampler, examples = run.policy(), run.sampler(2), run.prompts()
    runs = {"shipped surrogate": run}
    runs |= {name: alignkit.load(Path(name, "run.toml"), {"surrogate.init": name}) for name in options.surrogate}
    surrogates = {name: network for name, r in runs.items() if (network := r.load_surrogate(policy)) is not None}
    reward = AttributeBinding(judge=str(WEIGHTS / "judge"), mode="soft")
    reward.load(policy.device)
    generator = torch.Generator().manual_seed(0)
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in range(options.batches):
        chosen = torch.randperm(len(examples), generator=generator)[:PROMPTS].tolist()
        prompt = encode_examples(policy, [examples[i] for i in chosen])
        noises = torch.randn(PROMPTS, 3, *policy.latent_shape, generator=generator)
        with torch.no_grad():
            states = states_of(run_sampler(policy, sampler, prompt, noises))
        clean = sampler.transition(policy, states.x, states.step, states.prompt).clean
        for name, found in slopes(clean, states.prompt, policy, reward, surrogates).items():
            by_weight = torch.autograd.grad((clean * found).sum(), policy.parameters(), retain_graph=True)
            flat = torch.cat([g.flatten() for g in by_weight])
            half = sums.setdefault(name, (torch.zeros_like(flat), torch.zeros_like(flat)))
            half[batch % 2].add_(flat)

    def cosine(one: str, i: int, two: str, j: int) -> float:
        return float(F.cosine_similarity(sums[one][i], sums[two][j], dim=0))

    signal = {name: cosine(name, 0, name, 1) for name in sums}
    table = Table("gradient of", "halves", "agreement")
    for name in sums:
        across = (cosine(name, 0, REWARD, 1) + cosine(name, 1, REWARD, 0)) / 2
        both = signal[name] * signal[REWARD] if min(signal[name], signal[REWARD]) > 0 else 0.0
        table.add_row(name, f"{signal[name]:.2f}", f"{across / sqrt(both):.2f}" if both else "not known")
    Console().print(table)


if __name__ == "__main__":
    main()
