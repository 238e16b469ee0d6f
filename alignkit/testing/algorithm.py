"""Promises of every algorithm, checked in the loop that trains with it."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from alignkit.config.load import (
    DataConfig,
    PluginConfig,
    RewardConfig,
    RunConfig,
    SurrogateConfig,
    TrainConfig,
)
from alignkit.errors import ConfigError
from alignkit.interfaces import Algorithm, Reward, Sampler, Surrogate
from alignkit.models.quiet import errors_only
from alignkit.records import Example, PolicyFacts, Rows
from alignkit.registry import default_registry
from alignkit.rewards.combine import Combination
from alignkit.rewards.weighted import WeightedRewards
from alignkit.testing.expect import about, differences, expect, global_rng_untouched, leaves
from alignkit.testing.losses import columns, the_loss_is_true, the_surrogate_loss_is_a_mean
from alignkit.testing.world import (
    ODD_PROMPTS,
    PROMPTS,
    Brightness,
    Form,
    PartlyInvalid,
    Tied,
    TinyImages,
    TinyPairs,
    Unscored,
    tiny_policy,
)
from alignkit.training import checkpoint
from alignkit.training.context import TrainContext
from alignkit.training.regularisers import Weighed
from alignkit.training.trainer import Trainer

NEEDS = {"surrogate", "teacher", "images", "pairs", "stochastic_steps", "differentiable_reward"}


def check_algorithm(
    algorithm: Algorithm[Any, Any],
    sampler: Sampler | None = None,
    *,
    form: Form = "lcm",
    surrogate: Surrogate | None = None,
    reward: Reward | None = None,
) -> None:
    """Raise AssertionError, in one line, for the first promise of `alignkit.interfaces.Algorithm` that is not kept.

    It trains an untrained pipeline of this `form` for a few rounds with `sampler` (by default the registered `lcm` at 2
    steps) and `reward` (by default the mean of all pixels); `surrogate` is by default the algorithm's own
    `default_surrogate`. Raises ConfigError where the algorithm refuses the sampler (see `refusal`).
    """
    sampler = two_steps() if sampler is None else sampler
    name = type(algorithm).__name__
    with (
        about(f"algorithm {name} with sampler {type(sampler).__name__} on {form}"),
        errors_only(),
        torch.random.fork_rng(),
    ):
        unknown = set(algorithm.needs) - NEEDS
        expect(not unknown, f"needs: found {sorted(unknown)}, expected only {', '.join(sorted(NEEDS))}")
        if reason := refusal(algorithm, sampler):
            raise ConfigError(reason)

        def make(settings: Mapping[str, Any] | None = None) -> Trainer:
            torch.manual_seed(0)  # initial weights of a surrogate come from torch's generator
            return tiny_trainer(algorithm, sampler, form=form, surrogate=surrogate, reward=reward)

        trainer = make()
        _a_round_taken_apart(trainer)
        _rewards_without_information(trainer)
        with tempfile.TemporaryDirectory() as folder:
            assert_goes_on_from_its_checkpoint(make, {}, Path(folder))


def two_steps() -> Sampler:
    """Return the registered sampler `lcm` at 2 steps."""
    sampler: Sampler = default_registry().get("sampler", "lcm")(num_steps=2)
    return sampler


def refusal(algorithm: Algorithm[Any, Any], sampler: Sampler) -> str:
    """Explain why a run refuses this algorithm with this sampler; empty if it does not."""
    if "stochastic_steps" in algorithm.needs and not sampler.stochastic_steps():
        return f"every step of {type(sampler).__name__} is deterministic, and the algorithm needs stochastic steps"
    try:
        algorithm.check(sampler, PolicyFacts())
    except ConfigError as error:
        return str(error)
    return ""


def tiny_trainer(
    algorithm: Algorithm[Any, Any],
    sampler: Sampler,
    *,
    form: Form = "lcm",
    surrogate: Surrogate | None = None,
    reward: Reward | None = None,
    regularisers: Sequence[Weighed] = (),
) -> Trainer:
    """Build a trainer of a copy of `algorithm`, before its first round: two prompts a round, four rows an update, the
    first round for the surrogate alone if there is one. `regularisers` are (name, weight, regulariser)."""
    algorithm, regularisers = copy.deepcopy(algorithm), copy.deepcopy(list(regularisers))
    settings = None
    policy = tiny_policy(form)
    if "surrogate" in algorithm.needs:
        own = algorithm.default_surrogate
        if surrogate is None and not own:
            raise ConfigError(
                "the algorithm needs a surrogate and has no default_surrogate; pass one to check_algorithm"
            )
        surrogate = copy.deepcopy(surrogate) if surrogate is not None else default_registry().get("surrogate", own)()
        assert surrogate is not None
        wanted, found = algorithm.surrogate_type.__name__, type(surrogate).__name__
        expect(isinstance(surrogate, algorithm.surrogate_type), f"surrogate: found {found}, expected one of {wanted}")
        surrogate.load(policy)
        settings = SurrogateConfig(name=own, warmup=1)
    name = type(algorithm).__name__
    config = RunConfig(
        sampler=PluginConfig(type(sampler).__name__),
        algorithm=PluginConfig(name),
        rewards=[RewardConfig("the reward")],
        surrogate=settings,
        data=DataConfig(batch_size=2),
        train=TrainConfig(updates=10**6, rows_per_update=4, rows_per_pass=4, learning_rate=1e-3),
    )
    AcceleratorState._reset_state()
    trained = [("the reward", 1.0, reward or Brightness())] if algorithm.uses_rewards else []
    rewards = WeightedRewards(trained, needed=False)
    rewards.load(policy.device)
    needs: frozenset[str] = algorithm.needs.union(*(regulariser.needs for _, _, regulariser in regularisers))
    ctx = TrainContext(
        accelerator=Accelerator(cpu=True),
        policy=policy,
        teacher=tiny_policy("teacher", trainable=False) if "teacher" in needs else None,
        sampler=sampler,
        surrogate=surrogate if settings else None,
        rewards=rewards,
        combination=Combination(config.rewards, config.scoring),
        rows_per_update=4,
        chunk=8,
    )
    examples = [Example(text) for text in (*PROMPTS, *(ODD_PROMPTS if reward is None else ()))]
    images: Any = TinyImages() if "images" in needs else None
    pairs: Any = TinyPairs() if "pairs" in needs else None
    trainer = Trainer(config, ctx, algorithm, examples, images, pairs, regularisers=regularisers)
    algorithm.setup(ctx)
    trainer.regularisers.setup(ctx)
    return trainer


def _a_round_taken_apart(trainer: Trainer) -> None:
    """Run collect, rows and losses of one round separately; up to five rounds, until one gives rows."""
    if trainer.warming_up:
        with global_rng_untouched("while the surrogate warms up"):
            list(trainer.round())
    ctx, algorithm = trainer.ctx, trainer.algorithm
    for _ in range(5):
        ctx.warming_up = trainer.warming_up
        batch = trainer.batch()
        batch = replace(batch, pairs=list(batch.pairs))
        kept = leaves(columns(batch))
        with global_rng_untouched("in collect"), torch.no_grad(), trainer.accelerator.autocast():
            collected = algorithm.collect(batch, ctx)
        trainer.batches += 1
        expect(leaves(columns(batch)) == kept, "collect changed the batch that it was given, expected it unchanged")
        with global_rng_untouched("in surrogate_updates"):
            lessons = list(algorithm.surrogate_updates(collected, ctx))
        if lessons and ctx.surrogate is not None:
            the_surrogate_loss_is_a_mean(trainer, lessons[0])
        with global_rng_untouched("in updates"):
            updates = list(trainer._in_precision(algorithm.updates(collected, ctx)))
        if updates:
            break
    expect(bool(updates), "five rounds gave nothing to learn from, expected updates to yield rows")
    rows = updates[0]
    expect(isinstance(rows, Rows), f"updates yielded {type(rows).__name__}, expected a table derived from Rows")
    the_loss_is_true(trainer, rows)


def _rewards_without_information(trainer: Trainer) -> None:
    """Check that ties and images that cannot be scored never reach the weights as NaN."""
    usual = trainer.ctx._rewards
    for reward in (Tied(), PartlyInvalid(), Unscored()):
        trainer.ctx._rewards = WeightedRewards([("the reward", 1.0, reward)])
        with about(f"a round with the reward {type(reward).__name__}"):
            logged = [update.metrics for update in trainer.round()]
            # Metrics that no update followed would be reported with the next one.
            for metrics in [*logged, trainer.ctx.take_metrics()]:
                wrong = [n for n, v in metrics.items() if not math.isfinite(v)]
                expect(
                    not wrong, f"found {wrong[0] if wrong else ''} not finite, expected rows that can be learned from"
                )
            weights = trainer.ctx.policy.weights().values()
            expect(
                all(bool(w.isfinite().all()) for w in weights),
                "found weights that are not finite, expected finite numbers",
            )
    trainer.ctx._rewards = usual


def assert_goes_on_from_its_checkpoint(
    make: Callable[..., Trainer], settings: Mapping[str, Any], folder: Path
) -> list[Mapping[str, float]]:
    """Check that a trainer that restores what another saved after two rounds learns the same in the next, to the bit;
    returns the metrics of that round."""
    first, second = make({**settings, "train.updates": 9}), make({**settings, "train.updates": 9})
    for _ in range(2):
        list(first.round())
    first.save(folder, {})
    saved = checkpoint.latest(folder)
    assert saved is not None
    metrics = [update.metrics for update in first.round()]
    expect(bool(metrics), "the third round gave nothing to learn from, expected updates to yield rows")
    second.restore(saved)
    again = [update.metrics for update in second.round()]
    apart = sorted({n for a, b in zip(metrics, again, strict=False) for n in a if a[n] != b.get(n)})
    expect(
        again == metrics,
        f"a run that went on from its checkpoint had other metrics ({', '.join(apart) or 'more or fewer updates'}); "
        "state_dict must hold all that the next update depends on, and random numbers come from ctx.generator",
    )
    for name in ("state_dict", "rank_state"):
        wrong = differences(getattr(second, name)(), getattr(first, name)())
        expect(not wrong, f"a run that went on from its checkpoint differs in {', '.join(wrong[:3])}")
    return metrics
