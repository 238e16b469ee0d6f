"""Promises of every sampler."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from alignkit.errors import AlignkitError
from alignkit.interfaces import Policy, Sampler
from alignkit.records import Prompt, Transition
from alignkit.rollout import run_sampler
from alignkit.testing.expect import about, all_finite, expect, global_rng_untouched, same
from alignkit.testing.world import FORMS, PROMPTS, tiny_policy

STEPS = 1, 2, 4


def check_sampler(sampler: Sampler, policy: Policy | None = None) -> None:
    """Raise AssertionError, in one line, for the first promise of `alignkit.interfaces.Sampler` that is not kept.

    It runs its own `num_steps`, and 1, 2 and 4 where its fields allow these, through `policy` if that is
    given, else through an untrained consistency model and an untrained model that predicts the noise; through these it
    takes a step of wide latents too.
    """
    samplers = {sampler.num_steps: sampler}
    for num_steps in STEPS:
        try:
            samplers.setdefault(num_steps, replace(sampler, num_steps=num_steps))
        except (ValueError, AlignkitError):
            continue  # its own fields refuse this number
    for one in [policy] if policy is not None else [tiny_policy(form) for form in FORMS]:
        for num_steps, wanted in sorted(samplers.items()):
            with about(f"sampler {type(sampler).__name__} with num_steps = {num_steps}"), torch.random.fork_rng():
                _check(wanted, one)
                if policy is None:
                    _any_size_will_do(wanted, one)


def _check(sampler: Sampler, policy: Policy) -> None:
    count, num_steps = 3, sampler.num_steps
    prompt = policy.encode(PROMPTS[:count])
    grid = _the_grid_leads_down(sampler, policy)
    scale = sampler.initial_scale(policy)
    expect(math.isfinite(scale) and scale > 0, f"initial_scale: found {scale}, expected a number above 0")
    noises = torch.randn((count, num_steps + 1, *policy.latent_shape), generator=torch.Generator().manual_seed(0))
    noises = noises.to(policy.device)
    with global_rng_untouched("during a walk"), torch.no_grad():
        first, second = run_sampler(policy, sampler, prompt, noises), run_sampler(policy, sampler, prompt, noises)
    expect(torch.equal(first.next_states, second.next_states), "the same walk twice: found other latents")
    likely = int((first.std > 0).all(0).sum())
    expect(
        likely == sampler.stochastic_steps(),
        f"stochastic_steps: found {sampler.stochastic_steps()}, expected {likely}, the steps with std above 0",
    )
    for k in range(num_steps):
        at = torch.full((count,), k, device=policy.device)
        step = _transition(sampler, policy, first.states[:, k], at, prompt)
        same(step.draw(noises[:, k + 1]), first.next_states[:, k], f"step {k} replayed")
        if bool((step.std > 0).all()):
            noise = (noises[:, k + 1] ** 2).flatten(1).mean(1)
            expected = -noise / 2 - step.std.log() - 0.5 * math.log(2 * math.pi)
            same(step.log_prob(first.next_states[:, k]), expected, f"log_prob of what step {k} drew", 1e-3, 1e-3)
    drift = float((first.next_states[:, -1] - first.clean[:, -1]).norm() / first.clean[:, -1].norm())
    expect(
        drift < 0.1, f"the last step ends {drift:.0%} away from the clean latent it predicts, expected less than 10 %"
    )
    _rows_stand_alone(sampler, policy, prompt, noises[:, 0] * scale, len(grid))
    _the_gradient_is_true(sampler, policy, prompt, noises[:, 0] * scale)


def _the_grid_leads_down(sampler: Sampler, policy: Policy) -> Tensor:
    grid = sampler.grid(policy)
    expect(
        tuple(grid.shape) == (sampler.num_steps,),
        f"grid: found shape {tuple(grid.shape)}, expected ({sampler.num_steps},)",
    )
    expect(torch.equal(grid, sampler.grid(policy)), "grid: found other times at a second call, expected the same")
    alpha, sigma = policy.schedule(grid.to(policy.device))
    level = (sigma / alpha).tolist()
    expect(level == sorted(set(level), reverse=True), f"grid: found {grid.tolist()}, expected the noisiest time first")
    return grid


def _transition(sampler: Sampler, policy: Policy, x: Tensor, k: Tensor, prompt: Prompt) -> Transition:
    """One step, with the shapes it must have, from inputs that it leaves as they are."""
    kept = x.clone(), k.clone(), prompt.index.clone(), prompt.table.clone()
    with torch.no_grad():
        step = sampler.transition(policy, x, k, prompt)
    given = x, k, prompt.index, prompt.table
    expect(all(map(torch.equal, kept, given)), "transition changed what it was given, expected it as it was")
    for name, value, shape in (
        ("mean", step.mean, x.shape),
        ("clean", step.clean, x.shape),
        ("std", step.std, k.shape),
    ):
        expect(value.shape == shape, f"transition: found {name} {tuple(value.shape)}, expected {tuple(shape)}")
        all_finite(value, f"transition: {name}")
    expect(step.mean.dtype == step.std.dtype == torch.float32, f"transition: found {step.mean.dtype}, expected float32")
    expect(bool((step.std >= 0).all()), f"transition: found std {float(step.std.min())}, expected 0 or more")
    return step


def _any_size_will_do(sampler: Sampler, policy: Policy) -> None:
    channels, height, width = policy.latent_shape
    x = torch.randn((1, channels, height, 2 * width), generator=torch.Generator().manual_seed(2))
    x = x * sampler.initial_scale(policy)
    with about(f"latents of {channels} x {height} x {2 * width}"):
        _transition(sampler, policy, x, torch.zeros(1, dtype=torch.long), policy.encode(PROMPTS[:1]))


def _rows_stand_alone(sampler: Sampler, policy: Policy, prompt: Prompt, x: Tensor, num_steps: int) -> None:
    """Rows of one call may stand at different steps, and in any order."""
    k = torch.arange(len(x), device=x.device).flip(0) % num_steps
    together = _transition(sampler, policy, x, k, prompt)
    for i in range(len(x)):
        row = torch.tensor([i], device=x.device)
        alone = _transition(sampler, policy, x[row], k[row], prompt.select(row))
        for name in ("mean", "std", "clean"):
            same(
                getattr(alone, name), getattr(together, name)[row], f"{name} of row {i} alone against in a batch", 1e-3
            )


def _the_gradient_is_true(sampler: Sampler, policy: Policy, prompt: Prompt, x: Tensor) -> None:
    """Check the gradient of the mean to the weights and to the latent, which methods follow back through the steps."""
    k = torch.zeros(len(x), dtype=torch.long, device=x.device)
    generator = torch.Generator().manual_seed(1)
    weight, direction = (torch.randn(x.shape, generator=generator).to(x.device) for _ in range(2))
    pixels = x.clone().requires_grad_()
    value = (sampler.transition(policy, pixels, k, prompt).mean * weight).mean()
    expect(value.requires_grad, "the mean has no gradient, expected one to the weights of the policy and to the latent")
    parameters = policy.parameters()
    to_latent, *to_weights = torch.autograd.grad(value, [pixels, *parameters], materialize_grads=True)
    expect(
        not parameters or any(bool(g.any()) for g in to_weights),
        "the mean has no gradient to the weights of the policy",
    )
    step = 1e-2
    with torch.no_grad():
        up, down = (
            (sampler.transition(policy, x + sign * step * direction, k, prompt).mean * weight).double().mean()
            for sign in (1, -1)
        )
    expected = (to_latent.double() * direction).sum()
    same((up - down) / (2 * step), expected, "the gradient to the latent against finite differences", 0.05, 1e-4)
