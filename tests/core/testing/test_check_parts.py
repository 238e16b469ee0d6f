"""A promise that is broken is found, and told in one line; one test a promise: samplers, surrogates and algorithms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.interfaces import Context, Policy, Surrogate
from alignkit.records import Prompt, Transition
from alignkit.testing import (
    check_algorithm,
    check_sampler,
    check_surrogate,
)
from alignkit_baselines.d3po import D3PO
from alignkit_baselines.pairs import Pairs
from alignkit_lasro.surrogate import LatentUNet
from alignkit_rg_lcd.algorithm import RGLCD
from alignkit_samplers.ddim import DDIM


class WrongCount(DDIM):
    def stochastic_steps(self) -> int:
        return self.num_steps + 1


class WrongWay(DDIM):
    def grid(self, policy: Policy) -> Tensor:
        return super().grid(policy).flip(0)


class Draws(DDIM):
    def transition(self, policy: Policy, x: Tensor, k: Tensor, prompt: Prompt) -> Transition:
        step = super().transition(policy, x, k, prompt)
        return replace(step, mean=step.mean + 0.1 * torch.randn_like(step.mean))


class OneStepForAll(DDIM):
    def transition(self, policy: Policy, x: Tensor, k: Tensor, prompt: Prompt) -> Transition:
        return super().transition(policy, x, k[:1].expand(len(k)), prompt)


class EndsInNoise(DDIM):
    def transition(self, policy: Policy, x: Tensor, k: Tensor, prompt: Prompt) -> Transition:
        step = super().transition(policy, x, k, prompt)
        return replace(step, mean=step.mean + x)


class Detached(DDIM):
    def transition(self, policy: Policy, x: Tensor, k: Tensor, prompt: Prompt) -> Transition:
        step = super().transition(policy, x, k, prompt)
        return replace(step, mean=step.mean.detach())


class Square(DDIM):
    def transition(self, policy: Policy, x: Tensor, k: Tensor, prompt: Prompt) -> Transition:
        step = super().transition(policy, x, k, prompt)
        return replace(step, mean=step.mean + 0 * torch.ones(policy.latent_shape))


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (WrongCount, r"stochastic_steps: found \d, expected \d, the steps with std above 0"),
        (WrongWay, "grid: found .* expected the noisiest time first"),
        (Draws, "during a rollout the global random generator of torch was used"),
        (OneStepForAll, "mean of row . alone against in a batch: found a difference"),
        (EndsInNoise, "the last step ends .* away from the clean latent it predicts"),
        (Square, "latents of 4 x 8 x 16: raised RuntimeError: The size of tensor a"),
        (Detached, "the mean has no gradient, expected one to the weights of the policy"),
    ],
)
def test_a_sampler(sampler: type[DDIM], message: str) -> None:
    with pytest.raises(AssertionError, match=rf"^sampler {sampler.__name__} with num_steps = \d: {message}"):
        check_sampler(sampler(num_steps=2, eta=1.0))


class Sums(LatentUNet):
    def loss(self, winner: Tensor, loser: Tensor, prompt: Prompt) -> Tensor:
        return super().loss(winner, loser, prompt) * len(winner)


class TurnedRound(LatentUNet):
    def loss(self, winner: Tensor, loser: Tensor, prompt: Prompt) -> Tensor:
        return super().loss(loser, winner, prompt).detach() + 0 * super().loss(winner, loser, prompt)


class Forgets(LatentUNet):
    bias = 0.0

    def load(self, policy: Policy) -> None:
        super().load(policy)
        self.bias += 1

    def score(self, latents: Tensor, prompt: Prompt) -> Tensor:
        return super().score(latents, prompt) + self.bias


@pytest.mark.parametrize(
    ("surrogate", "message"),
    [
        (Sums, "the mean of the losses of single pairs against the loss of all: found a difference"),
        (TurnedRound, "12 steps on the same pairs: loss from"),
        (Forgets, "scores after load and load_state_dict of what module"),
    ],
)
def test_a_surrogate(surrogate: type[Surrogate], message: str) -> None:
    with pytest.raises(AssertionError, match=rf"^surrogate {surrogate.__name__}: {message}"):
        check_surrogate(surrogate())


@dataclass
class SumOverRows(D3PO):
    def loss(self, rows: Pairs, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().loss(rows, ctx)
        return loss * len(rows), metrics


@dataclass
class DrawsInTheLoss(D3PO):
    def loss(self, rows: Pairs, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().loss(rows, ctx)
        return loss + 0 * ctx.noise(1).sum(), metrics


@dataclass
class CollectsGlobally(D3PO):
    def collect(self, batch: Any, ctx: Context) -> Pairs:
        torch.rand(1)
        return super().collect(batch, ctx)


@dataclass
class ForgetsItsCounter(D3PO):
    def updates(self, collected: Pairs, ctx: Context) -> Iterator[Pairs]:
        self.rounds: int = getattr(self, "rounds", 0) + 1
        ctx.log(rounds=float(self.rounds))
        return super().updates(collected, ctx)


@dataclass
class LetsNaNThrough(D3PO):
    def loss(self, rows: Pairs, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().loss(rows, ctx)
        return loss, metrics | {"spread": rows.rewards.std()}

    def updates(self, collected: Pairs, ctx: Context) -> Iterator[Pairs]:
        ctx.log(mean_of_pairs=collected.rewards.mean())
        return super().updates(collected, ctx)


@dataclass
class WantsTheMoon(D3PO):
    needs = frozenset({"stochastic_steps", "moon"})


@dataclass
class YieldsLists(D3PO):
    def updates(self, collected: Pairs, ctx: Context) -> Iterator[Any]:
        yield [collected]


@dataclass
class AsksAllTheSame(D3PO):
    uses_rewards = False


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (AsksAllTheSame, "the algorithm asks for scores and says uses_rewards = False"),
        (SumOverRows, "loss: found .* in one pass and .* in several, expected a mean over rows"),
        (DrawsInTheLoss, "loss drew from ctx.generator; draw in updates, into the rows"),
        (CollectsGlobally, "in collect the global random generator of torch was used"),
        (ForgetsItsCounter, r"a run that went on from its checkpoint had other metrics \(rounds\)"),
        (LetsNaNThrough, "a round with the reward Tied: found mean_of_pairs not finite"),
        (WantsTheMoon, r"needs: found \['moon'\], expected only"),
        (YieldsLists, "updates yielded list, expected a table derived from Rows"),
    ],
)
def test_an_algorithm(algorithm: type[D3PO], message: str) -> None:
    with pytest.raises(AssertionError, match=rf"^algorithm {algorithm.__name__} with sampler LCM on lcm: {message}"):
        check_algorithm(algorithm())


def test_a_surrogate_of_a_kind_that_the_algorithm_cannot_teach() -> None:
    with pytest.raises(AssertionError, match=r"^algorithm RGLCD .*: surrogate: found LatentUNet, expected one of LRM$"):
        check_algorithm(RGLCD(proxy=True), surrogate=LatentUNet())


def test_an_algorithm_that_refuses_the_sampler_is_no_failure_but_the_users_choice() -> None:
    with pytest.raises(ConfigError, match="every step of DDIM is deterministic"):
        check_algorithm(D3PO(), DDIM(num_steps=2, eta=0.0))


def test_the_state_of_an_algorithm_handed_in_is_not_touched() -> None:
    algorithm = D3PO()
    before: Mapping[str, Any] = dict(vars(algorithm))
    check_algorithm(algorithm)
    assert vars(algorithm) == before
