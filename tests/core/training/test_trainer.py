"""The loop: its batches, its averages, its own state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import get_scheduler

from alignkit.data.sources import Images
from alignkit.data.stream import Stream
from alignkit.errors import AlignkitError, ConfigError
from alignkit.interfaces import Reward
from alignkit.records import Example
from alignkit.rewards.weighted import WeightedRewards
from alignkit.testing.algorithm import assert_goes_on_from_its_checkpoint
from alignkit.training import checkpoint
from alignkit.training import trainer as train
from alignkit.training.trainer import Trainer
from alignkit.training.update import Update
from method_checks import copies, equal


def test_batches_follow_the_stream_of_the_seed(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer({"seed": 3})
    found = []
    for trainer.batches in range(4):
        batch = trainer.batch()
        found += [e.text for e in batch.examples]
        assert batch.images is not None and len(batch.images) == len(batch.captions) == 4
    assert found == [trainer._examples[i].text for i in Stream(5, 3).indices(0, 8)]


@pytest.mark.parametrize("caption", ["a sign", Example("a sign", {"target": "OPEN"})])
def test_a_caption_reaches_the_batch_as_an_example_with_the_metadata_of_its_image(
    make_trainer: Callable[..., Trainer], caption: str | Example
) -> None:
    class Signs(Images):
        def batch(self, start: int, size: int, seed: int) -> tuple[Tensor, Sequence[str | Example]]:
            return torch.zeros(size, 3, 64, 64), [caption] * size

    trainer = make_trainer()
    trainer._images = Signs()
    assert trainer.batch().captions == [Example("a sign", {} if isinstance(caption, str) else {"target": "OPEN"})] * 4


def test_rounds_warm_the_surrogate_up_before_the_policy_learns(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer({"surrogate.warmup": 2, "algorithm.policy_steps": 2, "train.updates": 3})
    before = copies(trainer.ctx.policy.parameters())
    assert [u.step for _ in range(2) for u in trainer.round()] == [0, 0]
    assert equal(before, trainer.ctx.policy.parameters())
    assert not trainer.warming_up
    steps = [u.step for _ in range(2) for u in trainer.round()]
    assert steps == [1, 2, 3] and trainer.finished  # a round ends early with the run


def test_the_average_follows_the_trained_weights_with_its_decay(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer({"train.ema_decay": 0.75, "surrogate.warmup": 0})
    weights = [{n: p.detach().clone() for n, p in trainer.ctx.policy.weights().items()}]
    for _ in range(2):
        list(trainer.round())
        weights.append({n: p.detach().clone() for n, p in trainer.ctx.policy.weights().items()})
    for name, average in trainer.average.items():
        first, second, third = (w[name] for w in weights)
        assert torch.allclose(average, 0.75 * (0.75 * first + 0.25 * second) + 0.25 * third, atol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_follows_the_schedules_of_transformers(make_trainer: Callable[..., Trainer], schedule: str) -> None:
    name = {"constant": "constant_with_warmup"}.get(schedule, schedule)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs, expected = get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=6), []
    for _ in range(6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    rates = {"train.learning_rate": 0.5, "train.schedule": schedule, "train.warmup": 2, "train.updates": 6}
    trainer = make_trainer({"algorithm.policy_steps": 6, "surrogate.warmup": 0, **rates})
    found = [update.metrics["learning_rate"] for update in trainer.round()]
    assert found == pytest.approx(expected) and found[0] == 0 and max(found) == 0.5
    assert trainer.optimizer.param_groups[0]["lr"] == found[-1]


def test_every_update_of_a_round_reports_the_reward_of_its_samples(make_trainer: Callable[..., Trainer]) -> None:
    assert math.isnan(Update(1, {"loss": 0.0}).reward)
    trainer = make_trainer({"algorithm.policy_steps": 3, "train.updates": 6, "surrogate.warmup": 0})
    rounds = [list(trainer.round()) for _ in range(2)]
    assert [[u.step for u in each] for each in rounds] == [[1, 2, 3], [4, 5, 6]]
    for each in rounds:
        assert ["reward" in u.metrics for u in each] == [True, False, False]
        assert {u.reward for u in each} == {each[0].metrics["reward"]}
    assert rounds[0][0].reward != rounds[1][0].reward


def test_an_update_that_nothing_was_scored_for_has_no_reward(
    make_trainer: Callable[..., Trainer], odd_rewards: None
) -> None:
    trainer = make_trainer({"algorithm.policy_steps": 2, "reward": ["unscored"], "surrogate.warmup": 0})
    assert all(math.isnan(update.reward) for update in trainer.round())


def test_pairs_are_read_some_at_a_time_as_they_are_used(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer({
        "algorithm.name": "diffusion_dpo", "data.pairs": "alignkit_shapes.data:DrawingPairs",
        "train.rows_per_update": 7, "data.images": "",
    })  # fmt: skip
    assert trainer._pairs is not None
    monkeypatch.setattr(train, "PAIRS_AT_ONCE", 3)
    whole, read, trainer.batches = trainer._pairs.batch(14, 7, 0), [], 2
    real = trainer._pairs.batch
    monkeypatch.setattr(trainer._pairs, "batch", lambda start, size, seed: read.append(size) or real(start, size, seed))
    pairs = iter(trainer.batch().pairs)
    assert read == []
    some = [next(pairs)]
    assert read == [3]
    some += pairs
    assert read == [3, 3, 1]
    assert torch.equal(torch.cat([part.losers for part in some]), whole.losers)
    assert [text for part in some for text in part.captions] == list(whole.captions)


def test_metrics_are_averaged_over_an_update_and_then_forgotten(make_trainer: Callable[..., Trainer]) -> None:
    ctx = make_trainer().ctx
    ctx.log(a=1.0, b=torch.tensor(4.0))
    ctx.log(a=2.0)
    assert ctx.take_metrics() == {"a": 1.5, "b": 4.0} and ctx.take_metrics() == {}
    ctx.warn("twice")
    ctx.warn("twice")
    assert ctx.warnings == ["twice"]


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_reaches_the_weights(
    make_trainer: Callable[..., Trainer],
) -> None:
    trainer = make_trainer({"surrogate.warmup": 0})
    before = copies(trainer.ctx.policy.parameters())
    loss = trainer.algorithm.loss
    trainer.algorithm.loss = lambda rows, ctx: (loss(rows, ctx)[0] * math.inf, {})  # type: ignore[method-assign]
    with pytest.raises(AlignkitError, match="update 1 is not finite"):
        list(trainer.round())
    assert equal(before, trainer.ctx.policy.parameters())


def test_the_gradient_norm_is_reported_as_it_was_before_clipping(make_trainer: Callable[..., Trainer]) -> None:
    norms = []
    for bound in (1e9, 1e-9):
        trainer = make_trainer({"surrogate.warmup": 0, "train.max_grad_norm": bound})
        norms += [update.metrics["grad_norm"] for update in trainer.round()]
    assert norms[0] == norms[1] > 1e-6


def test_a_trainer_goes_on_from_the_checkpoint_of_another(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    assert_goes_on_from_its_checkpoint(make_trainer, {}, tmp_path)


def test_a_checkpoint_of_another_number_of_processes_is_refused(
    make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = make_trainer()
    trainer.save(tmp_path, {"lines": 3})
    assert trainer.restore(tmp_path / "000000") == {"lines": 3}
    state = checkpoint.load(tmp_path / "000000")
    checkpoint.save(tmp_path, 1, state | {"ranks": state["ranks"] * 2})
    with pytest.raises(ConfigError, match="000001: saved by 2 processes, resumed by 1; resume with 2"):
        trainer.restore(tmp_path / "000001")


def test_collecting_takes_the_precision_of_the_loss_and_rewards_take_their_own(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer({"train.precision": "bf16", "surrogate.warmup": 0})
    policy, mixed = trainer.ctx.policy, []
    for name in ("denoise", "decode"):
        method = getattr(policy, name)

        def noted(*arguments: Any, name: str = name, method: Any = method) -> torch.Tensor:
            mixed.append((name, torch.is_autocast_enabled("cpu")))
            return method(*arguments)

        monkeypatch.setattr(policy, name, noted)
    list(trainer.round())
    assert set(mixed) == {("denoise", True), ("decode", False)}


def test_other_questions_about_images_decode_nothing_again_and_are_not_logged(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Weighed(Reward):
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
            return images.mean((1, 2, 3)) * torch.tensor([float(len(example.text)) for example in examples])

    ctx = make_trainer({"evaluate.batch_size": 2}).ctx
    monkeypatch.setattr(ctx, "_rewards", WeightedRewards([("weighed", 1.0, Weighed())]))
    latents, (a, b) = ctx.noise(5), (Example("a red circle"), Example("a blue square"))
    own, others = [a, b, a, b, a], [(4, b), (0, b), (1, a), (0, a), (4, a), (4, b)]
    alone = ctx.score(latents, own)
    logged = ctx.take_metrics()
    again = ctx.score(latents[[row for row, _ in others]], [example for _, example in others], log=False)
    decode, decoded = ctx.policy.decode, []
    monkeypatch.setattr(ctx.policy, "decode", lambda z: (decoded.append(len(z)), decode(z))[1])
    together = ctx.score(latents, own, others=others)
    assert decoded == [2, 2, 1]
    torch.testing.assert_close(together.values, torch.cat([alone.values, again.values]))
    torch.testing.assert_close(together.parts["weighed"], together.values)
    assert together.valid.all() and len(set(together.values.tolist())) > 5
    assert ctx.take_metrics() == pytest.approx(logged)
    with pytest.raises(IndexError, match="others: found row 5, expected less than 5, the number of latents"):
        ctx.score(latents, own, others=[(5, a)])


@pytest.mark.parametrize("precision", ["bf16"])
def test_mixed_precision_keeps_the_trained_weights_in_float32(
    make_trainer: Callable[..., Trainer], precision: str
) -> None:
    trainer = make_trainer({"train.precision": precision, "surrogate.warmup": 0})
    (update,) = trainer.round()
    assert math.isfinite(update.metrics["loss"]) and math.isfinite(update.metrics["surrogate_loss"])
    assert {p.dtype for p in trainer.ctx.policy.parameters()} == {torch.float32}
