"""Where the gradient of a surrogate leads: samples of a model moved along it, judged and read off.

    python benchmarks/gradient.py [--run RUN] [--surrogate RUN]

A learned reward may rank samples well and still point nowhere useful. Here no policy is trained: the clean latents of
`--prompts` training prompts take four steps along the gradient of the shipped surrogate, less its score under another
prompt (`algorithm.contrast`), and for comparison along that of the judge itself through the decoder; each as it is and
through the teacher (`algorithm.purify`). The gradient is the mean over four draws of noise (`algorithm.smoothing`),
scaled to a root mean square over all samples of `distance`, in units of a latent's spread. With `--surrogate` it is
that of a run, lasro's or the proxy of rg_lcd. `score` is what the surrogate makes of them, less that under the other
prompt. With `--run`, a run of `lasro` on shapes_lcm, its policy answers the same noises: how far it moves the samples
(root mean square), and how far the mean of all.
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
    """`latents` (N, *S) behind four steps along the gradient of `score`; those with a small gradient move less."""
    x = latents
    for _ in range(4):
        total = torch.zeros_like(x)
        for _ in range(4):
            there = x.clone().requires_grad_(True)
            total += torch.autograd.grad(score(there).sum(), there)[0]
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
    judges = [AttributeBinding(judge=str(WEIGHTS / "judge"), mode=mode) for mode in ("hard", "soft")]
    for judge in judges:
        judge.load(policy.device)
    hard, soft = judges
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        noises = seeded_noises(policy.latent_shape, 2, [(77, i) for i in range(len(examples))])
        clean = run_sampler(policy, sampler, prompt, noises).clean
        trained = None
        if arguments.run:
            its = open_run(arguments.run)
            if its.config.model.name != "shapes_lcm":
                parser.error(
                    f"--run {arguments.run}: found a run on {its.config.model.name}, expected one on shapes_lcm"
                )
            learner = its.policy()
            with learner.using(its.average):
                trained = run_sampler(learner, sampler, learner.encode([e.text for e in examples]), noises).clean
    teacher = DiffusersPolicy(run.teacher_source(), trainable=False, guidance_scale=1.0)
    level = torch.full((len(examples),), arguments.purify)

    def noise() -> Tensor:
        return torch.randn(clean[:, 0].shape, generator=chance)

    other = prompt.select(torch.arange(len(examples)).roll(1))

    def surrogate_score(x: Tensor) -> Tensor:
        x = x + arguments.smoothing * noise()
        return surrogate.score(x, prompt) - surrogate.score(x, other)

    def judge_score(x: Tensor) -> Tensor:
        return soft(quantize(policy.decode(x + arguments.smoothing * noise())), examples).values

    def purified(score: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: score(teacher.denoise(add_noise(x, noise(), *teacher.schedule(level)), level, prompt))

    def show(what: str, latents: Tensor) -> None:
        with torch.no_grad():
            images = quantize(policy.decode(latents))
            judged, read_off = (float(r(images, examples).values.mean()) for r in (hard, PixelCheck()))
            liked = float(torch.stack([surrogate_score(latents) for _ in range(4)]).mean())
        print(f"{what:<48} judge {judged:.3f}  pixel check {read_off:.3f}  score {liked:.2f}", flush=True)

    for step in (0, 1):
        latents = clean[:, step]
        show(f"{step + 1} step{'s' * step}", latents)
        if trained is not None:
            way = trained[:, step] - latents
            far, shared = (float(x.square().mean().sqrt()) for x in (way, way.mean(0)))
            show(f"  {arguments.run}, moved {far:.2f}, mean {shared:.2f}", trained[:, step])
        for name, score in (("surrogate", surrogate_score), ("judge", judge_score)):
            for distance in (0.1, 0.2):
                show(f"  {name}, distance {distance}", moved(score, latents, distance))
                show(f"  {name} through the teacher, distance {distance}", moved(purified(score), latents, distance))


if __name__ == "__main__":
    main()
