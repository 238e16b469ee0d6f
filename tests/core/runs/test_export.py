"""Exported weights: every format has the effect of the run's own weights, in readers that know nothing of alignkit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import alignkit
from alignkit.cli.app import app
from alignkit.errors import AlignkitError
from alignkit.models.pipelines import LORA_FILE
from alignkit.runs import export as exports
from alignkit.runs.run import Run
from alignkit.training import checkpoint

MakeRun = Callable[..., Run]
VISIBLE = {"train.learning_rate": 0.05, "train.ema_decay": 0.5, "model.lora_targets": ["to_q", "to_v", "conv1"]}
"""So large a step size that the weights soon differ clearly from the start; convolutions have other shapes."""


@pytest.fixture
def finished(trained_once: Callable[[dict[str, Any]], Run]) -> Run:
    """A run that has ended, with points, in a folder of the test's own."""
    return trained_once({**VISIBLE, "evaluate.points": 2, "train.keep_checkpoints": 9})


def inputs(unet: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    edge, width = unet.config.sample_size, unet.config.cross_attention_dim
    return {
        "sample": torch.randn((1, unet.config.in_channels, edge, edge), generator=generator),
        "timestep": torch.tensor([499]),
        "encoder_hidden_states": torch.randn((1, 7, width), generator=generator),
        "timestep_cond": torch.zeros(1, unet.config.time_cond_proj_dim) if unet.config.time_cond_proj_dim else None,
    }


@torch.no_grad()
def output(unet: Any) -> Tensor:
    found: Tensor = unet(**inputs(unet)).sample
    return found


def trained(run: Run, which: str = "average", update: int = 4, scale: float = 1.0) -> Tensor:
    """Return the output of the run's network with weights of a checkpoint."""
    policy: Any = run.policy()
    state = checkpoint.load(run.folder / "checkpoints" / f"{update:06d}")["trainer"]
    weights = state["average" if which == "average" else "policy"]
    with policy.using({name: value * scale if "lora_B" in name else value for name, value in weights.items()}):
        return output(policy.unet)


def plain(run: Run) -> Any:
    """Return the pipeline before training, as plain diffusers loads it."""
    return DiffusionPipeline.from_pretrained(run.config.model.name)


def kohya(unet: Any, file: Path) -> Any:
    """Merge a file of kohya into a network, by that format's definition."""
    tensors = load_file(file)
    weights = {f"lora_unet_{name.replace('.', '_')}": module for name, module in unet.named_modules()}
    for name in {key.partition(".")[0] for key in tensors}:
        down, up, alpha = (tensors[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        change = (up.flatten(1) @ down.flatten(1)) * (alpha / len(down))
        with torch.no_grad():
            weights[name].weight += change.view_as(weights[name].weight)
    return unet


def read(run: Run, folder: Path, format: str) -> Tensor:
    if format == "merged":
        return output(DiffusionPipeline.from_pretrained(folder).unet)
    pipe = plain(run)
    if format == "peft":
        return output(PeftModel.from_pretrained(pipe.unet, folder))
    if format == "diffusers":
        pipe.load_lora_weights(folder)
        return output(pipe.unet)
    pipe.load_lora_weights(folder, weight_name="lora.safetensors")
    by_diffusers, by_definition = output(pipe.unet), output(kohya(plain(run).unet, folder / "lora.safetensors"))
    torch.testing.assert_close(by_diffusers, by_definition, rtol=0, atol=1e-5)
    return by_definition


@pytest.mark.parametrize("format", ["diffusers", "peft", "kohya", "comfyui", "merged"])
def test_every_format_has_the_effect_of_the_weights(finished: Run, tmp_path: Path, format: Any) -> None:
    before, found = output(plain(finished).unet), {}
    for scale in (1.0, 0.5):
        found[scale] = read(finished, finished.export(tmp_path / str(scale), format, scale=scale), format)
        torch.testing.assert_close(found[scale], trained(finished, scale=scale), rtol=0, atol=1e-4)
    assert min((found[1.0] - before).abs().max(), (found[1.0] - found[0.5]).abs().max()) > 0.01


def test_a_choice_of_weights_and_checkpoint_is_kept(finished: Run, tmp_path: Path) -> None:
    assert not torch.equal(trained(finished, "last"), trained(finished))
    for number, (choice, expected) in enumerate(
        [
            ({"weights": "last"}, trained(finished, "last")),
            ({"checkpoint": 2, "weights": "average"}, trained(finished, "average", 2)),
        ]
    ):
        found = read(finished, finished.export(tmp_path / str(number), **choice), "diffusers")  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    shutil.rmtree(finished.folder / "checkpoints" / "000002")
    found = read(finished, finished.export(tmp_path / "point", checkpoint=2), "diffusers")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # the point keeps the same average


def test_the_files_say_where_they_come_from_and_are_the_same_each_time(finished: Run, tmp_path: Path) -> None:
    files = [finished.export(tmp_path / name) / LORA_FILE for name in "ab"] + [finished.folder / LORA_FILE]
    assert len({file.read_bytes() for file in files}) == 1
    with safe_open(files[0], "pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["lora_adapter_metadata"]) == {
        "unet.r": 4, "unet.lora_alpha": 4, "unet.target_modules": ["conv1", "to_q", "to_v"],
    }  # fmt: skip
    assert metadata["alignkit.algorithm"] == "lasro" and metadata["alignkit.rewards"] == "brightness"
    assert (
        metadata["alignkit.base_model"] == finished.config.model.name and len(metadata["alignkit.prompts_sha256"]) == 64
    )
    with safe_open(finished.export(tmp_path / "c", "kohya", scale=0.5) / "lora.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"], metadata["alignkit.scale"]) == ("4", "4", "0.5")


def test_the_model_card_is_one_that_the_hub_reads(finished: Run, tmp_path: Path) -> None:
    folder = finished.export(tmp_path / "out")
    card = ModelCard.load(folder / "README.md")
    assert {"alignkit", "lasro", "lora"} <= set(card.data.tags) and card.data.to_dict()["library_name"] == "diffusers"
    assert "aligned with `brightness` by `lasro" in card.text and "| brightness | 1 step |" in card.text
    assert "![" in card.text and (folder / "samples.png").is_file()
    code = card.text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def test_full_fine_tuning_is_exported_as_a_unet_or_merged(tiny_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_run(overrides={"model.lora_rank": 0, "train.updates": 1})
    list(run.train())
    assert (run.export(tmp_path / "own") / "unet" / "config.json").is_file()
    found = output(DiffusionPipeline.from_pretrained(run.export(tmp_path / "merged", "merged")).unet)
    torch.testing.assert_close(found, trained(run, update=1), rtol=0, atol=1e-5)
    with pytest.raises(AlignkitError, match="has no best point; use --weights average or last"):
        run.export(tmp_path / "no", weights="best")
    for choice in ({"format": "kohya"}, {"scale": 0.5}):
        with pytest.raises(AlignkitError, match=r"model\.lora_rank = 0.*use --format diffusers or merged"):
            run.export(tmp_path / "no", **choice)  # type: ignore[arg-type]
    assert not (tmp_path / "no").exists()


def test_mistakes_are_one_line_and_leave_nothing(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("")
    for choice, message in (
        ({"out": full}, "exists already; choose another folder with --out"),
        ({"checkpoint": 3}, "found --checkpoint 3, expected one of 2, 4"),
        ({"format": "zip"}, "found format 'zip', expected one of diffusers, peft, kohya, comfyui, merged"),
        ({"weights": "worst"}, "found weights 'worst', expected one of average, last, best"),
    ):
        with pytest.raises(AlignkitError, match=message) as raised:
            finished.export(**{"out": tmp_path / "out", **choice})  # type: ignore[arg-type]
        assert "\n" not in str(raised.value)
    assert [path.name for path in full.iterdir()] == ["file"] and not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*partial"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished.folder, alignkit.load(None, {"algorithm.name": "lasro"}).folder)  # the run of today
    result = CliRunner().invoke(app, ["export", "shapes_lcm"])  # has nothing to do with it
    assert result.exit_code == 1 and "found no run folder; train one with" in result.stderr


def test_the_command_exports_and_uploads(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Hub:
        def create_repo(self, name: str, **options: Any) -> str:
            calls.append((name, options["private"]))
            return f"https://hub.test/{name}"

        def upload_folder(self, repo_id: str, folder_path: Path, **_: Any) -> None:
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
            if repo_id == "me/refused":
                raise OSError("401 Unauthorized\nlog in")

    monkeypatch.setattr(exports, "HfApi", Hub)
    arguments = ["export", str(finished.folder), "--format", "comfyui", "--out"]
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "a"), "--push", "me/lora"])
    assert result.stdout.splitlines() == [str(tmp_path / "a"), "https://hub.test/me/lora"]
    assert calls == [("me/lora", True), ("me/lora", ["README.md", "lora.safetensors", "samples.png"])]
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "b"), "--push", "me/refused"])
    assert result.exit_code == 1 and "--push me/refused: 401 Unauthorized; the files are in" in result.stderr
