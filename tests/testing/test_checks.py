"""A promise that is broken is found, and told in one line; one test a promise."""

from __future__ import annotations

import random
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.interfaces import Context, Example, Policy, PreferencePairs, Prompt, Scores, Surrogate, Transition
from alignkit.testing import (
    check_algorithm,
    check_model,
    check_pairs,
    check_pictures,
    check_reward,
    check_sampler,
    check_surrogate,
)
from alignkit.testing.world import Brightness, TinyPairs, TinyPictures, tiny_pipeline
from alignkit_baselines.d3po import D3PO
from alignkit_baselines.pairs import Pairs
from alignkit_lasro.surrogate import LatentUNet
from alignkit_samplers.ddim import DDIM
from plugin_fixtures import PluginFolder


def brightness(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


class LooksAtItsNeighbours(Brightness):
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        return brightness(images) - brightness(images).mean().detach()


class Restless(Brightness):
    calls = 0

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        self.calls += 1
        return brightness(images) + self.calls


class DrawsGlobally(Brightness):
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        torch.rand(1)
        return brightness(images)


class DrawsWithNumPy(Brightness):
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        np.random.rand()
        return brightness(images)


class DrawsWithPython(Brightness):
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        random.random()
        return brightness(images)


class Prints(Brightness):
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        print("scoring")
        return brightness(images)


class ChangesPrompts(Brightness):
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        for example in examples:
            example.metadata["seen"] = True  # type: ignore[index]
        return brightness(images)


class SaysItHasAGradient(Brightness):
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        return brightness(images).detach()


class HidesItsGradient(Brightness):
    differentiable = False


class HasTheWrongGradient(Brightness):
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        value = brightness(images)
        return value.detach() + 2 * (value - value.detach())


class LeadsOverToOthers(Brightness):
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        value = brightness(images)
        return value + value.sum() - value.sum().detach()


class OutOfBounds(Brightness):
    bounds = (0.9, 1.0)


class FailsOnTheEmptyPrompt(Brightness):
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        return brightness(images) / torch.tensor([float(bool(example.text)) for example in examples])


class WantsSquares(Brightness):
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        if images.shape[2] != images.shape[3]:
            raise ValueError("not square")
        return brightness(images)


class ForgetsWhatItIs(Restless):
    deterministic = False

    def fingerprint(self) -> str:
        return f"call {self.calls}"


class OneTooMany(Brightness):
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        return torch.ones(len(images) + 1)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (LooksAtItsNeighbours, "picture 0 alone against in a batch of 4: found a difference of"),
        (Restless, "the same call twice: found other scores, expected the same, or deterministic = False"),
        (ForgetsWhatItIs, r"fingerprint\(\): found 'call 1' behind a call, 'call 0' before"),
        (DrawsGlobally, "while scoring the global random generator of torch was used"),
        (DrawsWithNumPy, "the global random generator of NumPy was used"),
        (DrawsWithPython, "the global random generator of Python was used"),
        (Prints, "while scoring it printed 'scoring"),
        (ChangesPrompts, "the examples handed in were changed"),
        (SaysItHasAGradient, "differentiable = True, but the scores lack a gradient to the pixels"),
        (HidesItsGradient, "differentiable = False, but the scores have a gradient to the pixels; detach them"),
        (HasTheWrongGradient, "the gradient against finite differences: found a difference of"),
        (LeadsOverToOthers, "the score of one picture has a gradient to another"),
        (OutOfBounds, r"expected it within bounds = \(0.9, 1.0\)"),
        (FailsOnTheEmptyPrompt, "returned (inf|nan) for picture 0, '', expected a finite number"),
        (WantsSquares, "pictures of 48 x 80 pixels .* failed while scoring picture 0, 'a red circle': ValueError"),
        (OneTooMany, r"returned values of shape \(5,\), expected shape \(4,\)"),
    ],
)
def test_a_reward(reward: type[Brightness], message: str) -> None:
    with pytest.raises(AssertionError, match=rf"^reward {reward.__name__}: .*{message}") as caught:
        check_reward(reward())
    assert "\n" not in str(caught.value)


def test_a_reward_may_refuse_odd_prompts_and_sizes_mark_pictures_and_be_random() -> None:
    class Careful(Brightness):
        deterministic = False
        differentiable = False

        def check(self, examples: Any) -> None:
            if not all(example.text.startswith("a") for example in examples):
                raise ConfigError("careful: expected prompts that begin with a")

        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Scores:
            if images.shape[2] != images.shape[3]:
                raise ConfigError("careful: expected square pictures")
            valid = torch.arange(len(images)) > 0
            return Scores(torch.full((len(images),), random.Random().random()), valid)

    check_reward(Careful())


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


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (WrongCount, r"stochastic_steps: found \d, expected \d, the steps with std above 0"),
        (WrongWay, "grid: found .* expected the noisiest time first"),
        (Draws, "during a walk the global random generator of torch was used"),
        (OneStepForAll, "mean of row . alone against in a batch: found a difference"),
        (EndsInNoise, "the last step ends .* away from the clean latent it predicts"),
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
        (Forgets, "scores behind load and load_state_dict of what module"),
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


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
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


def test_an_algorithm_that_refuses_the_sampler_is_no_failure_but_the_users_choice() -> None:
    with pytest.raises(ConfigError, match="every step of DDIM is deterministic"):
        check_algorithm(D3PO(), DDIM(num_steps=2, eta=0.0))


def test_the_state_of_an_algorithm_handed_in_is_not_touched() -> None:
    algorithm = D3PO()
    before: Mapping[str, Any] = dict(vars(algorithm))
    check_algorithm(algorithm)
    assert vars(algorithm) == before


Batch = tuple[Tensor, list[str]]


class CountsCalls(TinyPictures):
    calls = 0

    def batch(self, start: int, size: int, seed: int) -> Batch:
        self.calls += 1
        return super().batch(start, size, seed + self.calls)


class DrawsPicturesGlobally(TinyPictures):
    def batch(self, start: int, size: int, seed: int) -> Batch:
        np.random.rand()
        return super().batch(start, size, seed)


class LooksAtTheBatch(TinyPictures):
    def batch(self, start: int, size: int, seed: int) -> Batch:
        pictures, captions = super().batch(start, size, seed)
        return pictures / pictures.max(), captions


class Levels(TinyPictures):
    def batch(self, start: int, size: int, seed: int) -> Batch:
        pictures, captions = super().batch(start, size, seed)
        return pictures * 255, captions


class ForgetsACaption(TinyPictures):
    def batch(self, start: int, size: int, seed: int) -> Batch:
        pictures, captions = super().batch(start, size, seed)
        return pictures, captions[1:]


class NoCaption(TinyPictures):
    def batch(self, start: int, size: int, seed: int) -> Batch:
        pictures, captions = super().batch(start, size, seed)
        return pictures, [*captions[1:], None]  # type: ignore[list-item]


class OneOrder(TinyPictures):
    def batch(self, start: int, size: int, seed: int) -> Batch:
        return super().batch(start, size, 0)


class Ends(TinyPictures):
    def batch(self, start: int, size: int, seed: int) -> Batch:
        return super().batch(range(100)[start], size, seed)


class HandsOutItsOwn(TinyPictures):
    kept: dict[tuple[int, int, int], Batch]

    def __init__(self) -> None:
        self.kept = {}

    def batch(self, start: int, size: int, seed: int) -> Batch:
        return self.kept.setdefault((start, size, seed), super().batch(start, size, seed))


class Doubles(TinyPictures):
    def batch(self, start: int, size: int, seed: int) -> Batch:
        pictures, captions = super().batch(start, size, seed)
        return pictures.double(), captions


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (CountsCalls, "the same positions a second time: found other items"),
        (DrawsPicturesGlobally, "while reading the global random generator of NumPy was used"),
        (LooksAtTheBatch, r"(from the third position on|position \d alone): found other items"),
        (Levels, r"found pictures from .* to 2.., expected values in \[0, 1\]"),
        (ForgetsACaption, "found 5 captions at 6 positions, expected one each"),
        (NoCaption, "found None as a caption, expected a string"),
        (OneOrder, "seed 1 gives what seed 0 gives, expected another order"),
        (Ends, "raised IndexError"),
        (HandsOutItsOwn, "the same positions a second time"),
        (Doubles, r"found pictures torch.float64 of shape \(6, 3, 64, 64\), expected float32"),
    ],
)
def test_a_source_of_pictures(source: type[TinyPictures], message: str) -> None:
    with pytest.raises(AssertionError, match=rf"^pictures {source.__name__}: {message}"):
        check_pictures(source(), 64)  # type: ignore[arg-type]


def test_a_source_of_pictures_of_another_size() -> None:
    with pytest.raises(AssertionError, match=r"found pictures of \(64, 64\) pixels, expected 32 x 32"):
        check_pictures(TinyPictures(), 32)  # type: ignore[arg-type]


class PrefersNothing(TinyPairs):
    def batch(self, start: int, size: int, seed: int) -> PreferencePairs:
        pairs = super().batch(start, size, seed)
        return replace(pairs, losers=pairs.winners.clone())


class UnequalPairs(TinyPairs):
    def batch(self, start: int, size: int, seed: int) -> PreferencePairs:
        pairs = super().batch(start, size, seed)
        return replace(pairs, losers=pairs.losers[..., :32])


class NotesAsText(TinyPairs):
    notes = "two were left out"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (PrefersNothing, "at position 0 winner and loser are the same picture"),
        (UnequalPairs, r"found winners \(6, 3, 64, 64\) and losers \(6, 3, 64, 32\), expected alike"),
        (NotesAsText, "notes: found 'two were left out', expected a list of lines"),
    ],
)
def test_a_source_of_pairs(source: type[TinyPairs], message: str) -> None:
    with pytest.raises(AssertionError, match=rf"^pairs {source.__name__}: {message}"):
        check_pairs(source())  # type: ignore[arg-type]


BUNDLES = """
    from alignkit.interfaces import ModelBundle as Bundle

    CALLS = []

    def growing():
        return Bundle("a/b", defaults={"train": {"updates": 2}})

    LOST = Bundle("/nowhere/at/all")
    TEACHERLESS = Bundle("a/b", teacher="x")
    WRONG = Bundle("a/b", algorithm_defaults={"ddpo": {"algorithm": {"samples": "two"}}})
    PICTURES = Bundle(HERE, defaults={
        "sampler": {"name": "lcm"}, "data": {"pictures": "bundles.models:Drawn"},
    })

    class Drawn: ...
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lost", "model: '/nowhere/at/all' is no folder and no hub id"),
        ("teacherless", "model: 'x' is no folder and no hub id"),
        ("wrong", 'under ddpo: model wrong: algorithm.samples: found "two", expected integer'),
        ("pictures", "data.pictures: 'bundles.models:Drawn' gives no source at 64 pixels: Drawn() takes no arguments"),
    ],
)
def test_a_model(plugins: PluginFolder, name: str, message: str) -> None:
    init = "from alignkit import hookimpl\n\n@hookimpl\ndef register_models(register):\n"
    for one in ("growing", "lost", "teacherless", "wrong", "pictures"):
        target = one if one == "growing" else one.upper()
        init += f'    register("{one}", "bundles.models:{target}", "One")\n'
    source = textwrap.dedent(BUNDLES).replace("HERE", repr(str(tiny_pipeline())))
    plugins.install("bundles", init, models=source)
    assert check_model("growing") == "its settings under lasro"
    with pytest.raises(AssertionError, match=f"^model {name}: {re.escape(message)}"):
        check_model(name)
