"""Short runs on tiny pipelines, and comparisons of what they leave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from alignkit.runs.run import Run
    from alignkit.training.trainer import Trainer

PROMPTS = ["a red circle", "a blue square and a green star", "a white ring", "a black heart", "an orange diamond"]


@pytest.fixture
def no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without their page, which takes about as long as a tiny run."""
    monkeypatch.setattr("alignkit.runs.report.keep_page", lambda folder, warn: None)


@pytest.fixture
def pages(no_pages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs with their page."""
    from alignkit.page.page import keep_page

    monkeypatch.setattr("alignkit.runs.report.keep_page", keep_page)


@pytest.fixture
def tiny_run(
    tmp_path: Path, brightness: None, tiny_lcm: Path, tiny_teacher: Path, kept_pipelines: None, no_pages: None
) -> Callable[..., Run]:
    """A function that makes short runs on the tiny pipelines in `tmp_path / output`, with the reward `brightness`."""
    import alignkit

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    settings: dict[str, Any] = {
        "model.name": str(tiny_lcm), "model.teacher": str(tiny_teacher), "model.lora_rank": 4,
        "sampler.name": "lcm", "sampler.num_steps": 2, "reward": ["brightness"],
        "data.prompts": str(prompts), "data.images": "alignkit_shapes.data:Drawings", "data.batch_size": 2,
        "algorithm.name": "lasro", "train.updates": 4, "train.rows_per_update": 4, "train.checkpoint_every": 2,
        "evaluate.prompts": str(prompts), "evaluate.limit": 2, "evaluate.steps": [1, 2], "evaluate.every": 0,
        "evaluate.points": 0,
    }  # fmt: skip
    lasro = {"algorithm.samples": 3}
    taught = {"surrogate.warmup": 1}

    def make(output: str = "run", overrides: Mapping[str, Any] | None = None) -> Run:
        chosen = settings | {"output": str(tmp_path / output)} | dict(overrides or {})
        if chosen["algorithm.name"] == "lasro":
            chosen = lasro | ({} if chosen.get("algorithm.gradient_of") == "reward" else taught) | chosen
        return alignkit.load(None, chosen)

    return make


@pytest.fixture
def make_trainer(tiny_run: Callable[..., Run], tiny_teacher: Path) -> Callable[..., Trainer]:
    """A function that builds the trainer of a tiny run; `ddim=True` takes the teacher, with all steps stochastic."""
    from alignkit.runs.display import Display
    from alignkit.runs.loop import Loop

    def make(overrides: Mapping[str, Any] | None = None, ddim: bool = False) -> Trainer:
        model = {"model.name": str(tiny_teacher), "sampler.name": "ddim", "sampler.eta": 1.0, "evaluate.steps": [3]}
        run = tiny_run(overrides=(model if ddim else {}) | dict(overrides or {}))
        return Loop(run, run.folder, run.accelerator(), Display(None, 1)).trainer

    return make


# The imports in functions spare the process that hands tests out to others from loading diffusers.


def final_state(folder: Path) -> dict[str, Any]:
    from alignkit.training import checkpoint

    saved = checkpoint.latest(folder / "checkpoints")
    assert saved is not None
    return checkpoint.load(saved)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run without the fields that measure time and memory."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    measured = ("seconds", "images_per_second", "memory_gib")
    return [{k: v for k, v in json.loads(line).items() if k not in measured} for line in lines]


def files(folder: Path) -> dict[str, bytes]:
    """Return the contents of the weights, image grids and points of a finished run, by path."""
    paths = [*folder.glob("*.safetensors"), *folder.glob("samples/*.png"), *folder.glob("points/*/*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def assert_same(folder: Path, other: Path) -> None:
    assert_same_state(folder, other)
    assert metrics(folder) == metrics(other)
    assert files(folder) == files(other)


def assert_same_state(folder: Path, other: Path, but: str = "nothing") -> None:
    from alignkit.testing.expect import differences

    assert not {name for name in differences(final_state(folder), final_state(other)) if but not in name}


def assert_same_but_surroundings(folder: Path, other: Path) -> None:
    """Compare two runs, except for the states of the global RNGs, which checkpoints store for third-party code."""
    assert_same_state(folder, other, but=".rng.")
    assert metrics(folder) == metrics(other) and files(folder) == files(other)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the one finished run of a module."""
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture
def trained_once(tiny_run: Callable[..., Run], shelf: Path, tmp_path: Path) -> Callable[[dict[str, Any]], Run]:
    """A function that trains a tiny run once a module, and opens a copy in the folder of each test."""

    def opened(overrides: dict[str, Any]) -> Run:
        import alignkit

        if not (shelf / "run").exists():
            shutil.copy(tmp_path / "prompts.txt", shelf)
            prompts = str(shelf / "prompts.txt")
            run = tiny_run(overrides={**overrides, "data.prompts": prompts, "evaluate.prompts": prompts})
            list(run.train())
            run.folder.rename(shelf / "run")
        shutil.copytree(shelf / "run", tmp_path / "run")
        return alignkit.load(resume=tmp_path / "run")

    return opened
