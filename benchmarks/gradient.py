"""Usefulness of a surrogate's gradient: move a model's samples along it, then score them with both rewards.

    python benchmarks/gradient.py [--run RUN] [--surrogate RUN]

A learned reward may rank samples well although its gradient points nowhere useful. Here no policy is trained: the clean
latents of `--prompts` training prompts take four steps along the gradient of the shipped surrogate minus its score
under another prompt (`algorithm.contrast`), and for comparison along the gradient of the VQA model itself through the
decoder; each directly and through the teacher (`algorithm.purify`). The gradient is the mean over four noise samples
(`algorithm.smoothing`), scaled so that its root mean square over all samples is `distance`, in units of the latents'
standard deviation. `--surrogate` uses the surrogate of a run instead, lasro's or the proxy of rg_lcd. `score` is the
surrogate's score of the result minus that under the other prompt. With `--run`, a run of `lasro` on shapes_lcm, its
policy samples from the same noises; the output states how far it moves the samples (root mean square) and their mean.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import alignkit
from alignkit.diffusion import add_noise
from alignkit.models.diffusers_policy import DiffusersPolicy
from alignkit.rewards.weighted import quantize
from alignkit.rollout import run_sampler, seeded_noises
from alignkit.runs.run import open_run
from alignkit_rewards.attribute_binding import AttributeBinding
from alignkit_shapes.models import WEIGHTS
from alignkit_shapes.reward import PixelCheck


def moved(score: Callable[[Tensor], Tensor], latents: Tensor, distance: float) -> Tensor:
    """Move `latents` (N, *S) four steps along the gradient of `score`; those with a small gradient move less."""
    x = latents
    for _ in range(4):
        total = torch.zeros_like(x)
        for _ in range(4):
            point = x.clone().requires_grad_(True)
            total += torch.autograd.grad(score(point).sum(), point)[0]
        x = x + distance / 4 * total / total.square().mean().sqrt().clamp(min=1e-9)
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--smoothing", type=float, default=0.3)
    parser.add_argument("--purify", type=int, default=250)
    parser.add_argument("--run", help="a run folder of lasro on shapes_lcm")
    parser.add_argument("--surrogate", metavar="RUN", help="a run folder on shapes_lcm whose surrogate is followed")
    arguments = parser.parse_args()
    run = alignkit.load(None, {"algorithm.name": "lasro"})
    policy, sampler, examples = run.policy(), run.sampler(2), run.prompts()[: arguments.prompts]
    learned = run
    if source := arguments.surrogate:
        if open_run(source).config.surrogate is None:
            parser.error(f"--surrogate {source}: found a run without a surrogate")
        learned = alignkit.load(Path(source, "run.toml"), {"surrogate.init": source})
    surrogate = learned.load_surrogate(policy)
    assert surrogate is not None
    prompt = policy.encode([e.text for e in examples])
    hard, soft = (AttributeBinding(judge=str(WEIGHTS / "judge"), mode=mode) for mode in ("hard", "soft"))
    for reward in (hard, soft):
        reward.load(policy.device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        noises = seeded_noises(policy.latent_shape, 2, [(77, i) for i in range(len(examples))])
        clean = run_sampler(policy, sampler, prompt, noises).clean
        trained = None
        if arguments.run:
            lasro = open_run(arguments.run)
            if lasro.config.model.name != "shapes_lcm":
                parser.error(
                    f"--run {arguments.run}: found a run on {lasro.config.model.name}, expected one on shapes_lcm"
                )
            learner = lasro.policy()
            with learner.using(lasro.weights):
                trained = run_sampler(learner, sampler, learner.encode([e.text for e in examples]), noises).clean
    teacher = DiffusersPolicy(run.teacher_source(), trainable=False, guidance_scale=1.0)
    level = torch.full((len(examples),), arguments.purify)

    def noise() -> Tensor:
        return torch.randn(clean[:, 0].shape, generator=generator)

    other = prompt.select(torch.arange(len(examples)).roll(1))

    def surrogate_score(x: Tensor) -> Tensor:
        x = x + arguments.smoothing * noise()
        return surrogate.score(x, prompt) - surrogate.score(x, other)

    def vqa_score(x: Tensor) -> Tensor:
        return soft(quantize(policy.decode(x + arguments.smoothing * noise())), examples).values

    def purified(score: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: score(teacher.denoise(add_noise(x, noise(), *teacher.schedule(level)), level, prompt))

    def show(what: str, latents: Tensor) -> None:
        with torch.no_grad():
            images = quantize(policy.decode(latents))
            binding, checked = (float(r(images, examples).values.mean()) for r in (hard, PixelCheck()))
            estimate = float(torch.stack([surrogate_score(latents) for _ in range(4)]).mean())
        print(f"{what:<48} VQA model {binding:.3f}  pixel check {checked:.3f}  score {estimate:.2f}", flush=True)

    for step in (0, 1):
        latents = clean[:, step]
        show(f"{step + 1} step{'s' * step}", latents)
        if trained is not None:
            change = trained[:, step] - latents
            each, shared = (float(x.square().mean().sqrt()) for x in (change, change.mean(0)))
            show(f"  {arguments.run}, moved {each:.2f}, mean {shared:.2f}", trained[:, step])
        for name, score in (("surrogate", surrogate_score), ("VQA model", vqa_score)):
            for distance in (0.1, 0.2):
                show(f"  {name}, distance {distance}", moved(score, latents, distance))
                show(f"  {name} through the teacher, distance {distance}", moved(purified(score), latents, distance))


if __name__ == "__main__":
    main()
