"""Trackers: what TensorBoard and Weights & Biases get, at which steps, and how they fail."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

import alignkit
from alignkit.errors import ConfigError
from alignkit.runs.run import Run

MakeRun = Callable[..., Run]
SETTINGS: dict[str, Any] = {
    "train.updates": 2, "evaluate.points": 1, "evaluate.points_limit": 2, "evaluate.rewards": ["jpeg_compressibility"],
    "surrogate.warmup": 2, "train.learning_rate": 0.05,
}  # fmt: skip


def events(folder: Path) -> Any:
    found = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the extra tensorboard"
    )
    return found.EventAccumulator(str(folder / "trackers")).Reload()


def scalars(found: Any, name: str) -> dict[int, float]:
    listed = found.Scalars(name)
    steps = [event.step for event in listed]
    assert len(steps) == len(set(steps))
    return {event.step: event.value for event in listed}


def texts(found: Any, name: str) -> dict[int, str]:
    return {e.step: e.tensor_proto.string_val[0].decode() for e in found.Tensors(f"{name}/text_summary")}


def records(folder: Path, key: str) -> dict[int, dict[str, Any]]:
    """Return the records with a key, by update."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if key in line}


def test_tensorboard_gets_the_whole_record_at_its_updates(tiny_run: MakeRun) -> None:
    run = tiny_run(overrides=SETTINGS | {"train.trackers": ["tensorboard"]})
    rewards = [update.reward for update in run.train()]
    found = events(run.folder)
    assert not (run.folder / "alignkit").exists()
    logged = scalars(found, "train/reward")
    assert list(logged) == list(scalars(found, "speed/seconds")) == [-1, 0, 1, 2]
    assert [logged[1], logged[2]] == pytest.approx(rewards)
    for kind, steps in (("evaluation", 2), ("point", 1)):
        events_of = records(run.folder, kind)
        before, after = (next(r for r in events_of[s][kind] if r["num_steps"] == steps) for s in (0, 2))
        name = f"{kind}/{after['reward']}/{steps}_steps"
        assert scalars(found, f"{name}/mean") == pytest.approx({0: before["before"], 2: after["after"]})
        assert scalars(found, f"{name}/mean_high") == pytest.approx({0: before["before_high"], 2: after["after_high"]})
        assert scalars(found, f"{name}/difference_low") == pytest.approx({2: after["low"]})
    drift = scalars(found, "drift/1_steps")
    assert drift[0] == 0 and drift[2] > 0
    assert texts(found, "verdict") == {2: records(run.folder, "verdict")[2]["text"]}
    assert texts(found, "exported")[2].startswith("exports the")
    assert 'name = "lasro"' in texts(found, "settings")[0]
    for name in ("images/evaluation", "images/points"):
        assert [image.step for image in found.Images(name)] == [0, 2]
    with Image.open(run.folder / "samples" / "000002.png") as grid:
        assert (found.Images("images/evaluation")[1].width, found.Images("images/evaluation")[1].height) == grid.size


def test_a_resumed_run_is_one_curve(tiny_run: MakeRun) -> None:
    run = tiny_run(overrides={
        "algorithm.name": "ddpo", "algorithm.samples": 2, "train.trackers": ["tensorboard"], "evaluate.prompts": "",
        "train.updates": 4, "train.checkpoint_every": 2,
    })  # fmt: skip
    list(run.train())
    shutil.rmtree(run.folder / "checkpoints" / "000004")  # as if it had been killed after update 4
    list(alignkit.load(resume=run.folder).train())
    assert list(scalars(events(run.folder), "train/loss")) == [1, 2, 3, 4]


class FakeWandb(ModuleType):
    """The part of wandb that accelerate calls, with what it was given."""

    def __init__(self, fails_after: int = 1000) -> None:
        super().__init__("wandb")
        self.logged: list[dict[str, Any]] = []
        self.config = self
        self.fails_after, self.finished, self.metrics, self.started, self.settings = fails_after, False, [], {}, {}

    def init(self, **settings: Any) -> FakeWandb:
        if self.fails_after < 0:
            raise RuntimeError("api_key not configured\nmore")
        self.started = settings
        return self

    def update(self, values: dict[str, Any], allow_val_change: bool) -> None:
        self.settings = values

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        if len(self.logged) >= self.fails_after:
            raise ConnectionError("gone")
        assert step is None
        self.logged.append(values)

    def Image(self, image: Image.Image) -> tuple[int, int]:
        return image.size

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeWandb]:
    monkeypatch.setattr("alignkit.runs.build.find_spec", lambda name: object())

    def install(**fields: Any) -> FakeWandb:
        module = FakeWandb(**fields)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    return install


DDPO = {"algorithm.name": "ddpo", "algorithm.samples": 2, "train.updates": 2, "train.trackers": ["wandb"]}


def test_wandb_gets_settings_images_and_an_axis_of_updates(tiny_run: MakeRun, wandb: Callable[..., FakeWandb]) -> None:
    module = wandb()
    run = tiny_run(overrides=DDPO)
    list(run.train())
    own = {"name": run.folder.name, "id": (run.folder / "trackers" / "wandb_id.txt").read_text(), "resume": "allow"}
    assert module.started == {"project": "alignkit", "dir": str(run.folder / "trackers"), **own}
    assert module.settings["algorithm.fields.samples"] == 2 and module.settings["evaluate.steps"] == "[1, 2]"
    assert module.metrics == [("update", None), ("*", "update")] and module.finished
    assert [values["update"] for values in module.logged if "train/reward" in values] == [1, 2]
    images = [values for values in module.logged if "images/evaluation" in values]
    with Image.open(run.folder / "samples" / "000002.png") as grid:
        assert images[-1]["images/evaluation"] == [grid.size] and len(images) == 2


def test_a_resumed_run_goes_on_in_its_run_of_wandb(tiny_run: MakeRun, wandb: Callable[..., FakeWandb]) -> None:
    overrides = DDPO | {"evaluate.prompts": "", "train.checkpoint_every": 1}
    ids = []
    for name in ("one", "other"):
        module = wandb()
        run = tiny_run(name, overrides)
        list(run.train())
        ids.append(module.started["id"])
    assert ids[0] != ids[1] and all(ids)
    shutil.rmtree(run.folder / "checkpoints" / "000002")
    module = wandb()
    list(alignkit.load(resume=run.folder).train())
    assert module.started["id"] == ids[1]
    assert [values["update"] for values in module.logged if "train/reward" in values] == [2]


def test_a_tracker_that_fails_is_a_warning_and_one_that_does_not_start_an_error(
    tiny_run: MakeRun, wandb: Callable[..., FakeWandb]
) -> None:
    wandb(fails_after=2)
    run = tiny_run(overrides=DDPO)
    assert len(list(run.train())) == 2
    text = "train.trackers: wandb failed and is left out from now on (ConnectionError: gone)"
    assert (run.folder / "metrics.jsonl").read_text().count(text) == 1
    wandb(fails_after=-1)
    run = tiny_run("other", DDPO)
    with pytest.raises(
        ConfigError, match=r"wandb could not start \(RuntimeError: api_key not configured\); log in with"
    ):
        list(run.train())
    assert not run.folder.exists()
