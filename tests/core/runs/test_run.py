"""Runs: the files that they write, the images that they sample, evaluations, and what they refuse at the start."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import alignkit
from alignkit.commands.evaluate import evaluate
from alignkit.errors import AlignkitError, ConfigError
from alignkit.models.diffusers_policy import DiffusersPolicy
from alignkit.rollout import seeded_noises
from alignkit.runs.display import Display
from alignkit.runs.loop import Loop
from alignkit.runs.run import Run, open_run

MakeRun = Callable[..., Run]
TEXTS = ["a red circle", "a blue square and a green cross"]


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(p, dtype=np.float32) for p in images])


def records_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


VISIBLE = {"train.learning_rate": 0.05, "train.ema_decay": 0.5}
"""So large a step size that the weights soon differ visibly from the start."""


@pytest.fixture
def finished(trained_once: Callable[[dict[str, Any]], Run]) -> Run:
    """A run that has ended, opened from a folder of the test's own."""
    return trained_once(VISIBLE)


def test_a_run_leaves_all_that_is_promised(finished: Run) -> None:
    folder = finished.folder
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "run.toml", "environment.json", "metrics.jsonl", "samples", "checkpoints", "surrogate.safetensors",
        "pytorch_lora_weights.safetensors",
    }  # fmt: skip
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["000002", "000004"]
    assert [p.name for p in sorted((folder / "samples").iterdir())] == ["000000.png", "000004.png"]
    records = records_of(folder)
    assert [r["step"] for r in records] == [0, 0, 1, 2, 3, 4, 4, 4]  # before, warm-up, updates, export, after
    assert "evaluation" in records[0] and "evaluation" in records[-1]
    assert records[-2] == {
        "step": 4, "exported": 4, "weights": "average", "text": "exports the average weights of update 4 of 4"
    }  # fmt: skip
    for record in records[2:-2]:
        assert {"reward", "loss", "grad_norm", "surrogate_loss", "surrogate_score"} <= record.keys()
    assert alignkit.load(folder / "run.toml").config == finished.config
    assert finished.config.train.learning_rate == 0.05


def test_plain_diffusers_with_the_exported_adapter_samples_as_the_run_does(finished: Run, tiny_lcm: Path) -> None:
    steps, shape = 2, (4, 8, 8)
    noises = seeded_noises(shape, steps, [(0, 0), (0, 1)])
    pipe = DiffusionPipeline.from_pretrained(tiny_lcm, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    plain = pixels(sample_plainly(pipe, noises))
    pipe.load_lora_weights(finished.folder)
    sampled = pixels(sample_plainly(pipe, noises))
    expected = pixels(finished.sample(TEXTS, steps=steps))
    assert np.abs(sampled - expected).max() <= 1  # of 255
    assert np.abs(plain - expected).max() > 1


def sample_plainly(pipe: Any, noises: torch.Tensor) -> list[Image.Image]:
    """Two steps of the pipeline, with the noise that `noises` injects in the place of the scheduler's own."""
    step = pipe.scheduler.step

    def with_noise(output: torch.Tensor, t: int, x: torch.Tensor, **rest: Any) -> Any:
        last = pipe.scheduler.step_index == 1
        stepped = step(output, t, x, return_dict=False)
        if last:
            return stepped
        level = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps[1]]
        return level.sqrt() * stepped[1] + (1 - level).sqrt() * noises[:, 1], stepped[1]

    pipe.scheduler.step = with_noise
    try:
        images: list[Image.Image] = pipe(
            TEXTS, num_inference_steps=2, guidance_scale=8.5, latents=noises[:, 0], output_type="pil"
        ).images
    finally:
        del pipe.scheduler.step
    return images


def test_a_run_that_has_just_trained_samples_and_measures_as_when_it_is_opened_again(tiny_run: MakeRun) -> None:
    run = tiny_run(overrides=VISIBLE)
    list(run.train())
    again = alignkit.load(resume=run.folder)
    for steps in (1, 2, 4):
        images = (one.sample(TEXTS, steps=steps, seed=3) for one in (run, again))
        assert np.array_equal(*map(pixels, images))
    assert evaluate([run], seen=False) == evaluate([again], seen=False)


def test_sampling_does_not_depend_on_the_batch_size_and_counts_images_by_prompt(tiny_run: MakeRun) -> None:
    texts = [*TEXTS, "a black heart"]
    one = pixels(tiny_run(overrides={"evaluate.batch_size": 1}).sample(texts, count=2))
    all_at_once = pixels(tiny_run().sample(texts, count=2))
    assert one.shape == (6, 64, 64, 3) and np.abs(one - all_at_once).max() <= 1


def test_evaluation_of_a_finished_run_reports_what_its_training_reported(finished: Run) -> None:
    reported = records_of(finished.folder)[-1]["evaluation"]
    found = {(r.reward, r.num_steps): (r.before, r.after) for r in evaluate([finished], seen=False)}
    for row in reported:
        expected = (row["before"], row["after"])
        assert found[row["reward"], row["num_steps"]] == pytest.approx(expected, abs=1e-6)


def test_a_folder_that_exists_is_refused_and_left_as_it_is(tiny_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_run()
    run.folder.mkdir()
    (run.folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        list(run.train())
    assert [p.name for p in run.folder.iterdir()] == ["notes.txt"]
    assert (run.folder / "notes.txt").read_text() == "mine"


def test_a_run_without_a_name_of_its_own_takes_the_first_that_is_free(
    tiny_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = []
    for _ in range(3):
        run = tiny_run(overrides={"output": "", "train.updates": 0})
        list(run.train())
        folders.append(run.folder)
    assert folders == [folders[0], Path(f"{folders[0]}-2"), Path(f"{folders[0]}-3")]
    with pytest.raises(ConfigError, match=r"-3 exists and is not empty"):
        list(run.train())
    assert folders[0].name.endswith("-lasro") and all((folder / "run.toml").is_file() for folder in folders)


def test_a_run_that_cannot_load_leaves_no_folder(tiny_run: MakeRun) -> None:
    for message in ("no layers", "no layers"):  # the second is not refused because there is a run
        run = tiny_run(overrides={"model.lora_targets": ["nothing"]})
        with pytest.raises(ConfigError, match=message):
            list(run.train())
        assert not run.folder.exists()


def test_a_tracker_that_is_not_installed_is_reported_before_weights_load(
    tiny_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignkit.runs.build.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"train.trackers: wandb is not installed; pip install 'alignkit\[wandb\]'"):
        tiny_run(overrides={"train.trackers": ["wandb"]}).check()


def test_resuming_takes_no_other_settings(finished: Run) -> None:
    with pytest.raises(ConfigError, match="keeps its own settings"):
        alignkit.load(resume=finished.folder, overrides={"train.updates": 9})
    with pytest.raises(ConfigError, match=r"no run\.toml"):
        alignkit.load(resume=finished.folder / "checkpoints")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sampler.num_steps": 0}, "num_steps"),
        ({"evaluate.steps": [0]}, "steps"),
        ({"evaluate.steps": [99]}, "steps: .*99"),
        ({"sampler.num_steps": 3}, "step_weights"),
        ({"data.prompts": ""}, "data.prompts"),
        ({"data.images": ""}, "data.images"),
        ({"data.prompts": "EMPTY"}, "contains no prompt"),
        ({"data.images": "nowhere"}, "data.images"),
        ({"model.teacher": ""}, "model.teacher"),
        ({"model.name": "FOLDER"}, "model_index"),
        ({"model.name": "./nowhere"}, "nowhere"),
        ({"surrogate.init": "nowhere.safetensors"}, "surrogate.init"),
    ],
)
def test_what_cannot_run_is_one_clear_line(
    tiny_run: MakeRun, tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "folder").mkdir()
    named = {"EMPTY": str(tmp_path / "empty.txt"), "FOLDER": str(tmp_path / "folder")}
    with pytest.raises(AlignkitError, match=message) as caught:
        list(tiny_run(overrides={k: named.get(str(v), v) for k, v in overrides.items()}).train())
    assert "\n" not in str(caught.value)


def test_a_run_of_no_updates_measures_the_model_as_it_is(tiny_run: MakeRun) -> None:
    run = tiny_run(overrides={"train.updates": 0})
    assert list(run.train()) == []
    last = records_of(run.folder)[-1]["evaluation"]
    assert all(row["before"] == row["after"] for row in last)


NO_REWARD: dict[str, dict[str, Any]] = {
    "lcd": {},
    "diffusion_dpo": {"data.pairs": "alignkit_shapes.data:DrawingPairs"},
    "pso": {"data.pairs": "alignkit_shapes.data:DrawingPairs", "algorithm.mode": "offline"},
    "rg_lcd": {"algorithm.beta": 0.0},
}


@pytest.mark.parametrize("algorithm", NO_REWARD)
def test_a_method_without_rewards_runs_without_one_and_measures_those_that_are_named(
    algorithm: str, tiny_run: MakeRun
) -> None:
    settings = {"algorithm.name": algorithm, "reward": [], "train.updates": 2, **NO_REWARD[algorithm]}
    run = tiny_run(overrides=settings)
    assert len(list(run.train())) == 2 and run.config.rewards == []
    assert not any("evaluation" in record for record in records_of(run.folder))
    assert (run.folder / "samples" / "000002.png").is_file()
    again = open_run(run.folder)
    assert again.config.rewards == []
    assert {row.reward for row in evaluate([again], seen=False)} == {"drift"}
    named = evaluate([again], rewards=["brightness"], seen=False)
    assert {row.reward for row in named} == {"brightness", "drift"}
    assert all(row.held_out for row in named if row.reward == "brightness")


def test_rewards_named_for_a_method_that_uses_none_are_measured_and_not_called_trained(tiny_run: MakeRun) -> None:
    run = tiny_run(
        overrides={"algorithm.name": "lcd", "train.updates": 2, "evaluate.rewards": ["jpeg_compressibility"]}
    )
    updates = list(run.train())
    assert all(math.isnan(update.reward) for update in updates)
    records = records_of(run.folder)
    rows = [row for record in records for row in record.get("evaluation", [])]
    assert {row["reward"] for row in rows} == {"brightness", "jpeg_compressibility"}
    assert all(row["held_out"] for row in rows) and not any("verdict" in record for record in records)


def test_without_prompts_there_is_nothing_to_evaluate_on(tiny_run: MakeRun) -> None:
    none = {"reward": [], "data.prompts": "", "evaluate.prompts": ""}
    run = tiny_run(overrides={"algorithm.name": "lcd", "train.updates": 1, **none})
    assert len(list(run.train())) == 1
    with pytest.raises(ConfigError, match=r"^evaluate\.prompts: missing"):
        evaluate([run])


@pytest.mark.parametrize("algorithm", ["ddpo", "lasro", "pso", "rg_lcd"])
def test_what_learns_from_rewards_needs_one(algorithm: str, tiny_run: MakeRun) -> None:
    with pytest.raises(ConfigError, match=r"^reward: none is given; expected at least one"):
        tiny_run(
            overrides={"algorithm.name": algorithm, "reward": [], "evaluate.rewards": ["jpeg_compressibility"]}
        ).check()


def test_a_surrogate_can_start_from_that_of_another_run(finished: Run, tiny_run: MakeRun, tmp_path: Path) -> None:
    second = tiny_run("second", {"surrogate.init": str(finished.folder), "surrogate.warmup": 0, "train.updates": 1})
    trainer = Loop(second, second.folder, second.accelerator(), Display(None, 1)).trainer
    assert trainer.ctx.surrogate is not None
    saved = load_file(finished.folder / "surrogate.safetensors")
    assert all(torch.equal(saved[n], t) for n, t in trainer.ctx.surrogate.module().state_dict().items())
    assert any(bool(t.any()) for n, t in saved.items() if n.startswith("head") and n.endswith("weight"))


def test_resuming_what_is_no_run_folder_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--resume .*gone: no run.toml here"):
        alignkit.load(resume=tmp_path / "gone")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"sampler.original_steps": 2000},
            r"sampler\.original_steps: found 2000, expected 1 to 1000, the number of",
        ),
        (
            {"sampler.original_steps": 30, "regulariser": [{"name": "lcd", "ode_steps": 30}]},
            r"regulariser\.lcd\.ode_steps: found 30, expected a divisor of 1000, the number of times of the model",
        ),
        (
            {"algorithm.name": "lcd", "sampler.original_steps": 30, "algorithm.ode_steps": 30},
            r"algorithm\.ode_steps: found 30, expected a divisor of 1000",
        ),
        (
            {"algorithm.states_from": "images", "algorithm.ode_steps": 30, "regulariser": []},
            r"algorithm\.ode_steps: found 30, expected a divisor of 1000",
        ),
        (
            {"sampler.name": "renoise", "sampler.num_steps": 2, "evaluate.steps": [1000], "regulariser": []},
            r"sampler\.num_steps: found 1000, expected 1 to 999",
        ),
    ],
)
def test_steps_that_do_not_fit_the_times_of_the_model_are_found_before_weights_load(
    tiny_run: MakeRun, monkeypatch: pytest.MonkeyPatch, overrides: dict[str, Any], message: str
) -> None:
    monkeypatch.delattr(DiffusersPolicy, "load")
    with pytest.raises(ConfigError, match=f"^{message}"):
        tiny_run(overrides=overrides).check()


def test_a_surrogate_that_begins_untrained_is_warned_of_before_anything_else(tiny_run: MakeRun) -> None:
    run = tiny_run(overrides={"surrogate.warmup": 0, "train.updates": 1})
    (warning,) = run.warnings()
    assert warning.startswith("surrogate: latent_unet begins untrained") and "surrogate.warmup" in warning
    list(run.train())
    assert records_of(run.folder)[0] == {"step": 0, "warning": warning}
    assert tiny_run("taught", {"surrogate.warmup": 1}).warnings() == []
    assert tiny_run("begun", {"surrogate.warmup": 0, "surrogate.init": str(run.folder)}).warnings() == []
    assert tiny_run("none", {"algorithm.gradient_of": "reward"}).warnings() == []


def test_a_name_that_is_no_run_and_no_model_is_one_line_about_both() -> None:
    with pytest.raises(ConfigError, match=r"^runs/nope: found no folder of a run .* and no registered model"):
        open_run("runs/nope")
