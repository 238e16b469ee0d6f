"""Promises of every surrogate."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from alignkit.interfaces import Policy, Surrogate
from alignkit.records import Prompt
from alignkit.testing.expect import about, all_finite, expect, global_rng_untouched, same
from alignkit.testing.world import PROMPTS, tiny_policy

LEARNING_STEPS = 12


def check_surrogate(surrogate: Surrogate, policy: Policy | None = None, *, within: float = 0.05) -> None:
    """Raise AssertionError, in one line, for the first promise of `alignkit.interfaces.Surrogate` that is not kept.

    It is taught a few pairs first, for a network may begin with a head of zeros, through `policy`, by default an
    untrained consistency model with latents of 4 x 8 x 8. `within` is how far a gradient may lie from finite
    differences. A ConfigError passes: a setting does not suit the policy, or a checkpoint is missing.
    """
    policy = tiny_policy() if policy is None else policy
    with about(f"surrogate {type(surrogate).__name__}"), torch.random.fork_rng():
        torch.manual_seed(0)  # initial weights come from torch's generator
        surrogate.load(policy)
        prompt = policy.encode([*PROMPTS, *PROMPTS[:2]])
        generator = torch.Generator().manual_seed(0)
        shape = (len(prompt), *policy.latent_shape)
        winner, loser = (torch.randn(shape, generator=generator).to(policy.device) + shift for shift in (0.5, -0.5))
        kept = winner.clone(), loser.clone(), prompt.table.clone()
        with global_rng_untouched("while scoring and learning"):
            _it_learns(surrogate, winner, loser, prompt)
            scores = _scores_alone_are_scores_together(surrogate, winner, prompt)
            _the_loss_is_a_mean(surrogate, winner, loser, prompt)
            _the_gradient_is_true(surrogate, winner, prompt, within)
        expect(
            all(map(torch.equal, kept, (winner, loser, prompt.table))), "the latents or prompts handed in were changed"
        )
        _the_weights_carry_it(surrogate, policy, winner, prompt, scores)


def _it_learns(surrogate: Surrogate, winner: Tensor, loser: Tensor, prompt: Prompt) -> None:
    module = surrogate.module()
    expect(module is surrogate.module(), "module() returned another network at a second call, expected the same")
    module.requires_grad_(True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    losses = []
    for _ in range(LEARNING_STEPS):
        loss = surrogate.loss(winner, loser, prompt)
        expect(loss.dim() == 0, f"loss: found shape {tuple(loss.shape)}, expected a scalar")
        all_finite(loss, "loss")
        expect(loss.requires_grad, "loss has no gradient to the parameters of module(), expected one to some of them")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    module.requires_grad_(False)
    expect(
        losses[-1] < losses[0],
        f"{LEARNING_STEPS} steps on the same pairs: loss from {losses[0]:.4g} to {losses[-1]:.4g}",
    )


def _scores_alone_are_scores_together(surrogate: Surrogate, latents: Tensor, prompt: Prompt) -> Tensor:
    with torch.no_grad():
        whole = surrogate.score(latents, prompt)
        found, count = f"{whole.dtype} {tuple(whole.shape)}", len(latents)
        expect(found == f"torch.float32 ({count},)", f"score: found {found}, expected torch.float32 ({count},)")
        all_finite(whole, "score")
        expect(torch.equal(surrogate.score(latents, prompt), whole), "the same call twice: found other scores")
        for i in range(count):
            row = torch.tensor([i])
            alone = surrogate.score(latents[row.to(latents.device)], prompt.select(row))
            same(alone, whole[i : i + 1], f"row {i} alone against in a batch of {count}")
        order = torch.arange(count).flip(0)
        mixed = surrogate.score(latents[order.to(latents.device)], prompt.select(order))
        same(mixed, whole.flip(0), "the batch in reverse order")
    return whole


def _the_loss_is_a_mean(surrogate: Surrogate, winner: Tensor, loser: Tensor, prompt: Prompt) -> None:
    with torch.no_grad():
        whole = surrogate.loss(winner, loser, prompt)
        rows = [torch.tensor([i]) for i in range(len(winner))]
        each = [surrogate.loss(winner[r], loser[r], prompt.select(r)) for r in rows]
        same(torch.stack(each).mean(), whole, "the mean of the losses of single pairs against the loss of all")
        swapped = surrogate.loss(loser, winner, prompt)
        expect(
            bool(swapped > whole),
            f"pairs turned round: found loss {float(swapped):.4g}, expected above {float(whole):.4g}",
        )
        all_finite(surrogate.loss(winner, winner, prompt), "the loss of pairs whose latents are equal")


def _the_gradient_is_true(surrogate: Surrogate, latents: Tensor, prompt: Prompt, within: float) -> None:
    given = latents.clone().requires_grad_()
    scores = surrogate.score(given, prompt)
    expect(scores.requires_grad, "score has no gradient to the latents while module() is frozen, expected one")
    (gradient,) = torch.autograd.grad(scores.sum(), given, retain_graph=True)
    all_finite(gradient, "the gradient to the latents")
    (first,) = torch.autograd.grad(scores[0], given)
    expect(not first[1:].any(), "the score of one latent has a gradient to another, expected each to stand alone")
    direction, step = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp(min=1e-12), 5e-2
    with torch.no_grad():
        up, down = (surrogate.score(latents + sign * step * direction, prompt).double() for sign in (1, -1))
    expected = (gradient.double() * direction).flatten(1).sum(1)
    noise = 1e-6 * float(scores.detach().abs().max()) / step
    same(
        (up - down) / (2 * step),
        expected,
        "the gradient to the latents against finite differences",
        within,
        noise + 1e-6,
    )


def _the_weights_carry_it(
    surrogate: Surrogate, policy: Policy, latents: Tensor, prompt: Prompt, scores: Tensor
) -> None:
    """All that was learned is in the state dict of `module()`, which is what a checkpoint holds."""
    state = copy.deepcopy(surrogate.module().state_dict())
    surrogate.load(policy)
    surrogate.module().load_state_dict(state)
    with torch.no_grad():
        again = surrogate.score(latents, prompt)
    same(again, scores, "scores behind load and load_state_dict of what module().state_dict() gave")
