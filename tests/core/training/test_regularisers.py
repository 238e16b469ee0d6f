"""Terms that the trainer adds to a loss: their rows, their passes, their state, and what they see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from alignkit.errors import PluginError
from alignkit.interfaces import Context, Regulariser
from alignkit.records import Batch, Prediction, Rows
from alignkit.testing.losses import assert_one_pass_is_several
from alignkit.training.predictions import recorded
from alignkit.training.regularisers import Regularisers
from alignkit.training.trainer import Trainer
from method_checks import collect

MakeTrainer = Callable[..., Trainer]


@dataclass(frozen=True)
class Numbers(Rows):
    values: Tensor


@dataclass
class Counting(Regulariser[int, Numbers]):
    """A term with a row of random numbers, which counts what is called."""

    more: int = 0
    seen: ClassVar[list[tuple[str, int]]] = []

    def __post_init__(self) -> None:
        self.updates = 0

    def collect(self, batch: Batch, ctx: Context) -> int:
        self.seen.append(("collect", len(batch.examples)))
        return len(batch.examples)

    def rows(self, collected: int | None, count: int, ctx: Context) -> Numbers:
        self.seen.append(("rows", collected or 0))
        return Numbers(torch.rand(count + self.more, generator=ctx.generator))

    def loss(
        self, rows: Numbers | None, predictions: Sequence[Prediction], ctx: Context
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert rows is not None and not predictions
        value = rows.values.mean() * (1 + ctx.policy.parameters()[0].square().sum())
        return value, {"counting_loss": value, "policy_loss": rows.values.mean()}

    def after_update(self, ctx: Context) -> None:
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates = state["updates"]


@dataclass
class Watching(Regulariser[None, Rows]):
    needs: ClassVar[frozenset[str]] = frozenset({"predictions"})
    seen: ClassVar[list[Sequence[Prediction]]] = []

    def loss(
        self, rows: Rows | None, predictions: Sequence[Prediction], ctx: Context
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen.append(predictions)
        return torch.zeros(()), {}


@pytest.fixture
def ddpo(make_trainer: MakeTrainer) -> Callable[..., Trainer]:
    """A trainer of DDPO with these regularisers."""

    def make(*members: tuple[str, float, Regulariser[Any, Any]], **settings: Any) -> Trainer:
        Counting.seen.clear()
        Watching.seen.clear()
        given = {"algorithm.name": "ddpo", "data.batch_size": 3, "train.rows_per_update": 5, "train.rows_per_pass": 2}
        trainer = make_trainer(given | {key.replace("__", "."): value for key, value in settings.items()})
        trainer.regularisers = Regularisers(members)
        return trainer

    return make


def test_a_round_collects_once_and_every_update_has_as_many_rows_as_the_algorithm(ddpo: Any) -> None:
    trainer = ddpo(("counting", 0.5, Counting()))
    updates = list(trainer._updates(collect(trainer)))
    assert Counting.seen == [("collect", 3), *[("rows", 3)] * len(updates)] and len(updates) == 2
    for rows in updates:
        parts = list(rows.split(2))
        assert [len(part) for part in parts] == [len(part.own) for part in parts] == [len(p.others[0]) for p in parts]
        assert torch.equal(torch.cat([part.others[0].values for part in parts]), rows.others[0].values)
        assert sum(map(len, parts)) == len(rows.own)


def test_the_loss_is_the_algorithms_and_the_weighted_terms_however_it_is_split(ddpo: Any) -> None:
    trainer = ddpo(("counting", 0.5, Counting()), ("watching", 3.0, Watching()))
    trainer.regularisers.collect(trainer.batch(), trainer.ctx)
    rows = next(trainer._updates(collect(trainer)))
    alone, _ = trainer.algorithm.loss(rows.own, trainer.ctx)
    total, metrics = trainer.regularisers.loss(rows, trainer.ctx, trainer.algorithm.loss)
    term = rows.others[0].values.mean() * (1 + trainer.ctx.policy.parameters()[0].square().sum())
    torch.testing.assert_close(total, alone + 0.5 * term)
    torch.testing.assert_close(metrics["counting_loss"], term)
    # A metric whose name the algorithm uses gets the name of the regulariser.
    torch.testing.assert_close(metrics["counting/policy_loss"], rows.others[0].values.mean())
    torch.testing.assert_close(metrics["policy_loss"], alone)
    assert_one_pass_is_several(trainer, rows)


def test_more_or_fewer_rows_than_the_algorithm_has_are_refused_by_name(ddpo: Any) -> None:
    trainer = ddpo(("counting", 0.5, Counting(more=1)))
    with pytest.raises(PluginError, match=r"^regulariser counting: rows returned 7 rows, expected 6 or None$"):
        list(trainer.round())


def test_nothing_is_called_while_a_surrogate_warms_up(make_trainer: MakeTrainer) -> None:
    Counting.seen.clear()
    trainer = make_trainer({"surrogate.warmup": 1})
    trainer.regularisers = Regularisers([("counting", 1.0, Counting())])
    assert [update.step for update in trainer.round()] == [0] and Counting.seen == []
    (update,) = trainer.round()
    assert Counting.seen == [("collect", 2), ("rows", 2)] and update.metrics["counting_loss"] > 0


def test_a_resumed_trainer_goes_on_with_the_state_of_its_regularisers(ddpo: Any, tmp_path: Path) -> None:
    trainer = ddpo(("counting", 0.5, Counting()))
    list(trainer.round())
    trainer.save(tmp_path, {})
    counting = Counting()
    again = ddpo(("counting", 0.5, counting))
    again.restore(tmp_path / f"{trainer.ctx.update:06d}")
    assert counting.updates == trainer.ctx.update == 2
    assert [u.metrics for u in again.round()] == [u.metrics for u in trainer.round()]


def test_a_regulariser_sees_the_predictions_with_gradient_of_each_pass(ddpo: Any) -> None:
    trainer = ddpo(("watching", 1.0, Watching()))
    list(trainer.round())
    assert [[len(prediction) for prediction in seen] for seen in Watching.seen] == [[2]] * 6
    for (prediction,) in Watching.seen:
        assert prediction.clean.requires_grad and prediction.guidance_scale is None
        with torch.no_grad():
            again = trainer.ctx.policy.denoise(prediction.x, prediction.t, prediction.prompt)
        assert again.shape == prediction.clean.shape and len(prediction.prompt) == len(prediction.t)


def test_predictions_are_noted_inside_the_block_alone(make_trainer: MakeTrainer) -> None:
    policy = make_trainer({"algorithm.name": "ddpo"}).ctx.policy
    x, t, prompt = torch.zeros(2, *policy.latent_shape), torch.tensor([9, 499]), policy.encode(["a", "b"])
    scale = torch.tensor([2.0, 3.0])
    usual = policy.denoise
    with recorded(policy) as found:
        clean = policy.denoise(x, t, prompt, scale)
        with torch.no_grad():
            policy.denoise(x, t, prompt)
        with policy.reference():
            policy.denoise(x, t, prompt)
        policy.denoise(x, t, prompt, guidance_scale=None)
    policy.denoise(x, t, prompt)
    first, second = found
    assert first.clean is clean and first.guidance_scale is scale and second.guidance_scale is None
    assert "denoise" not in vars(policy) and policy.denoise == usual


class Halving:
    """A policy that predicts a batch of several rows by halves, by calling itself, and fails at time 0."""

    def denoise(self, x: Tensor, t: Tensor, prompt: Any, guidance_scale: Tensor | None = None) -> Tensor:
        if not bool(t.all()):
            raise ValueError("time 0")
        if len(x) == 1:
            return 2 * x
        parts = zip(x.chunk(2), t.chunk(2), strict=True)
        return torch.cat([self.denoise(part, time, prompt, guidance_scale) for part, time in parts])


def test_a_prediction_that_a_policy_makes_by_calling_itself_is_noted_once() -> None:
    policy: Any = Halving()
    x, t = torch.ones(4, requires_grad=True), torch.arange(1, 5)
    with recorded(policy) as found:
        with pytest.raises(ValueError, match="time 0"):
            policy.denoise(x, t - 1, None)
        clean = policy.denoise(x, t, None)
        one = policy.denoise(x[:1], t[:1], None)
    assert [prediction.clean for prediction in found] == [clean, one]
    assert found[0].x is x and len(found[1].t) == 1


def test_a_policy_that_has_its_own_denoise_gets_it_back_after_an_error() -> None:
    def denoise(*arguments: Any) -> Tensor:
        raise ValueError("no")

    policy: Any = SimpleNamespace(denoise=denoise)
    with pytest.raises(ValueError, match="no"), recorded(policy):
        policy.denoise(None, None, None)
    assert policy.denoise is denoise


def test_without_a_regulariser_that_looks_nothing_is_recorded(ddpo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit.training.regularisers.recorded", None)
    trainer = ddpo(("counting", 0.5, Counting()))
    assert len(list(trainer.round())) == 2
