"""Scores of image files: in batches, with parts, and with errors in the middle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from alignkit.cli.app import app
from alignkit.commands.score import score
from alignkit.errors import ConfigError
from alignkit.records import Example
from alignkit.rewards.weighted import WeightedRewards
from alignkit_rewards.jpeg import JpegIncompressibility
from servers import Endpoint, running

BROKEN = "this is no image"
JPEG = "jpeg_incompressibility"


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder of images 00.png, 01.png, ... of these sizes; None stands for an unreadable file."""

    def write(*sizes: int | None) -> Path:
        (out := tmp_path / "images").mkdir()
        (tmp_path / "prompts.txt").write_text("a red circle\n")
        for number, size in enumerate(sizes):
            path = out / f"{number:02d}.png"
            if size is None:
                path.write_text(BROKEN)
            else:
                pixels = torch.rand(size, size, 3, generator=torch.Generator().manual_seed(number)) * 255
                Image.fromarray(pixels.byte().numpy()).save(path)
        return out

    return write


def command(reward: str, folder: Path, *more: str) -> Result:
    prompts = str(folder.parent / "prompts.txt")
    return CliRunner().invoke(app, ["score", reward, str(folder), "--prompts", prompts, "--device", "cpu", *more])


def names(records: Any) -> list[str]:
    return [Path(record["image"]).name for record in records]


def test_images_of_a_folder_are_scored_by_name(brightness: None, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, grey in (("b.png", 255), ("a.png", 51)):
        Image.new("RGB", (8, 8), (grey, grey, grey)).save(folder / name)
    prompts = tmp_path / "one.txt"
    prompts.write_text("anything")
    records = score("brightness", folder, prompts, device="cpu")
    assert [(Path(r["image"]).name, r["score"]) for r in records] == [
        ("a.png", pytest.approx(0.2)), ("b.png", pytest.approx(1.0))
    ]  # fmt: skip
    prompts.write_text("one\ntwo\nthree")
    with pytest.raises(ConfigError, match="3 prompts for 2 images"):
        score("brightness", folder, prompts)
    with pytest.raises(ConfigError, match="no images"):
        score("brightness", tmp_path / "nowhere", prompts)
    prompts.write_text("anything")
    with pytest.raises(ConfigError, match="--device quantum: cannot be used"):
        score("brightness", folder, prompts, device="quantum")


def test_without_a_file_of_prompts_each_image_has_its_own_text_file(folder: Callable[..., Path]) -> None:
    images = folder(8, 8)
    (images / "00.txt").write_text("\ufeffa red circle\n", encoding="utf-8")
    typed = ["score", JPEG, str(images), "--device", "cpu"]
    missing = CliRunner().invoke(app, typed)
    assert missing.exit_code == 1
    assert f"{images / '01.png'}: its prompt 01.txt cannot be read" in missing.stderr and "--prompts" in missing.stderr
    (images / "01.txt").write_text("a blue ring")
    assert [r["prompt"] for r in score(JPEG, images, device="cpu")] == ["a red circle", "a blue ring"]
    whole = CliRunner().invoke(app, typed)
    assert whole.exit_code == 0 and "01.png  a blue ring" in whole.stdout


def test_images_of_one_size_are_scored_together_to_the_bit_as_in_a_run(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    whole = WeightedRewards.score

    def held_out(self: WeightedRewards, images: torch.Tensor, examples: Any, chunk: int) -> Any:
        seen.append((len(images), images.shape[-1]))
        return whole(self, images, examples, chunk)

    monkeypatch.setattr(WeightedRewards, "score", held_out)
    path = folder(8, 8, 8, 16, 16, 8)
    found = score(JPEG, path, path.parent / "prompts.txt", {"evaluate.batch_size": 2}, "cpu")
    assert seen == [(2, 8), (1, 8), (2, 16), (1, 8)]
    assert names(found) == [f"{i:02d}.png" for i in range(6)]
    pixels = torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(3)) * 255
    image = (pixels.byte().float() / 255).permute(2, 0, 1)[None].contiguous()
    assert found[3]["score"] == float(JpegIncompressibility()(image, [Example("a red circle")])[0])


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_scores_before_an_unreadable_file_are_printed(folder: Callable[..., Path], form: list[str]) -> None:
    result = command(JPEG, folder(8, 8, 8, None, 8), *form, "--set", "evaluate.batch_size=2")
    assert result.exit_code == 1 and "03.png: cannot be read as an image" in result.stderr
    assert result.stderr.count("\n") == 1
    if form:
        assert names(json.loads(result.stdout)) == ["00.png", "01.png", "02.png"]
    else:
        assert [line.split()[1][-6:] for line in result.stdout.splitlines()[1:]] == ["00.png", "01.png", "02.png"]


def arguments(url: str, *more: str) -> list[str]:
    settings = {"url": f'"{url}"', "model": "judge", "mode": "rubric", "retries": 0}
    assignments = [f"reward.vlm_judge.{key}={value}" for key, value in settings.items()]
    return [word for one in [*assignments, "scoring.retries=0", *more] for word in ("--set", one)]


def test_vlm_judge_scores_several_images_at_once_and_its_parts_are_columns(folder: Callable[..., Path]) -> None:
    endpoint = Endpoint(lambda *_: '{"alignment": 4, "quality": 5}', slow=0.1)
    with running(endpoint):
        result = command("vlm_judge", folder(8, 8, 8, 8), *arguments(endpoint.url))
    assert result.exit_code == 0 and endpoint.most_at_once > 1
    heading, *lines = result.stdout.splitlines()
    assert heading.split() == ["score", "alignment", "quality", "image", "prompt"]
    assert [line.split()[:3] for line in lines] == [["0.8750", "4", "5"]] * 4


def test_scores_before_a_server_failed_are_printed(folder: Callable[..., Path]) -> None:
    endpoint = Endpoint(lambda *_: '{"alignment": 4, "quality": 5}' if len(endpoint.requests) <= 2 else (503, "gone"))
    with running(endpoint):
        result = command("vlm_judge", folder(8, 8, 8), *arguments(endpoint.url, "evaluate.batch_size=2"), "--json")
    assert result.exit_code == 1 and "reward 'vlm_judge'" in result.stderr and "gone" in result.stderr
    assert names(json.loads(result.stdout)) == ["00.png", "01.png"]


def test_images_that_all_could_not_be_scored_are_an_error_with_the_reason(folder: Callable[..., Path]) -> None:
    endpoint = Endpoint(lambda *_: "It is lovely.")
    with running(endpoint):
        result = command("vlm_judge", path := folder(8, 8), *arguments(endpoint.url))
    assert result.exit_code == 1
    assert (
        result.stderr
        == f"error: {path}: vlm_judge could not score any of the 2 images: no JSON object in 'It is lovely.'\n"
    )
    assert [line.split()[:2] for line in result.stdout.splitlines()[1:]] == [["not", "scored"]] * 2


def test_a_part_that_is_not_a_number_is_left_out_of_json(folder: Callable[..., Path], plugins: Any) -> None:
    plugins.install("parted", HOOKS, rewards=PARTED)
    (first, second) = json.loads(command("parted", folder(8, 8), "--json").stdout)
    assert first["parts"] == {"parted": 1.0, "parted/seen": 1.0} and second["parts"] == {"parted": 1.0}


HOOKS = """
    from alignkit import hookimpl

    @hookimpl
    def register_rewards(register):
        register("parted", "parted.rewards:Parted", "A part of the first image alone")
"""
PARTED = """
    import torch
    from alignkit.interfaces import Reward
    from alignkit.records import Scores


    class Parted(Reward):
        def __call__(self, images, examples):
            ones = torch.ones(len(images))
            return Scores(ones, ones > 0, {"seen": torch.where(torch.arange(len(images)) == 0, 1.0, torch.nan)})
"""
