"""Score image files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignkit.config.load import RunConfig
from alignkit.config.load import load as load_config
from alignkit.data.decode import UNREADABLE, as_rgb, open_image
from alignkit.data.image_files import GRID, METADATA, read_table
from alignkit.data.prompts import read_examples
from alignkit.errors import AlignkitError, ConfigError
from alignkit.models.device import find_device
from alignkit.records import Example, Scores
from alignkit.rewards.weighted import WeightedRewards
from alignkit.runs.build import Parts

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
Item = tuple[Path, Example, Tensor]
"""File, prompt and image (3, H, W) uint8."""


def score(
    reward: str,
    folder: str | Path,
    prompts: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Score the images of a folder: those of its `metadata.jsonl` in that order, without one all by name.

    `prompts` is a file with one prompt for each image by name, or one for all. Without it prompts are read from
    `metadata.jsonl`, as `alignkit sample` writes it, or else that of a.png from a.txt.

    Returns one record per image: {"image", "prompt", "score" (None if it could not be scored), "parts", "reason" (why
    it could not be scored, "" if the reward gives no reason)}.
    """
    return [record for batch in score_batches(reward, folder, prompts, overrides, device) for record in batch]


def score_batches(
    reward: str,
    folder: str | Path,
    prompts: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    device: str = "auto",
) -> Iterator[list[dict[str, Any]]]:
    """Yield the records of `score` batch by batch. An error about an image is raised after the records before it.

    Images of one size are scored `evaluate.batch_size` at a time, as in a run.
    """
    config = load_config(None, {**(overrides or {}), "reward": [reward]})
    files, examples = captioned(Path(folder), prompts, config)
    name = config.rewards[0].name
    for batch, scores in score_files(Parts(config), files, examples, device):
        yield _records(name, batch, scores)


def score_files(
    parts: Parts, files: Sequence[Path], examples: Sequence[Example], device: str = "auto"
) -> Iterator[tuple[list[Item], Scores]]:
    """Yield batches of image files with their scores by the rewards of a run, as `score_batches` does."""
    rewards = WeightedRewards(parts.trained_rewards(), scoring=parts.scoring())
    try:
        rewards.check(examples)
        where = find_device(device)
        rewards.load(where)
        for batch in _batches(files, examples, parts.config.evaluate.batch_size):
            images = torch.stack([image for _, _, image in batch]).to(where).float() / 255
            yield batch, rewards.score(images, [example for _, example, _ in batch], len(batch))
    finally:
        rewards.close()


def captioned(folder: Path, prompts: str | Path | None, config: RunConfig) -> tuple[list[Path], list[Example]]:
    """Return the images of a folder and the prompt of each, as `score` finds them; raises ConfigError if it cannot."""
    if prompts is None and (folder / METADATA).is_file():
        listed = list(read_table(folder / METADATA, config.data.caption_column, key="images"))
        if not listed:
            raise ConfigError(f"{folder / METADATA}: is empty, expected a JSON object for each image")
        return [image.path for image in listed], [Example(i.caption, i.metadata, i.name) for i in listed]
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
    if (folder / METADATA).is_file():
        files = [path for path in files if path.name != GRID]
    if not files:
        raise ConfigError(f"{folder}: no images here; expected .png, .jpg or .webp files")
    examples = _captions(files) if prompts is None else read_examples(prompts, config.data.prompt_column)
    if len(examples) == 1:
        examples = examples * len(files)
    if len(examples) != len(files):
        raise ConfigError(
            f"{prompts}: {len(examples)} prompts for {len(files)} images in {folder}; "
            "expected one per image, or one for all"
        )
    return files, examples


def _captions(files: Sequence[Path]) -> list[Example]:
    """Read the prompt of each image from the text file of the same name."""
    found = []
    for file in files:
        caption = file.with_suffix(".txt")
        try:
            text = caption.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{file}: its prompt {caption.name} cannot be read ({error}); expected a text file next to each image, "
                f"{METADATA}, or --prompts FILE"
            ) from error
        if not text:
            raise ConfigError(f"{caption}: is empty, expected the prompt of {file.name}, or --prompts FILE")
        found.append(Example(text, place=str(caption)))
    return found


def _batches(files: Sequence[Path], examples: Sequence[Example], most: int) -> Iterator[list[Item]]:
    """Yield runs of up to `most` images of one size. An unreadable image raises after those before it are yielded."""
    batch: list[Item] = []
    for file, example in zip(files, examples, strict=True):
        try:
            image = _read(file)
        except AlignkitError:
            if batch:
                yield batch
            raise
        if batch and (len(batch) == most or batch[0][2].shape != image.shape):
            yield batch
            batch = []
        batch.append((file, example, image))
    yield batch


def _read(file: Path) -> Tensor:
    """Read an image as (3, H, W) uint8. Raises AlignkitError if that fails."""
    try:
        with open_image(file) as opened:
            return torch.from_numpy(np.array(as_rgb(opened))).permute(2, 0, 1).contiguous()
    except UNREADABLE as error:
        raise AlignkitError(f"{file}: cannot be read as an image ({error})") from error


def _records(name: str, batch: Sequence[Item], scores: Scores) -> list[dict[str, Any]]:
    parts = {part: values.tolist() for part, values in scores.parts.items()}
    reasons = scores.reasons or [""] * len(batch)
    return [
        {
            "image": str(file),
            "prompt": example.text,
            "score": value if valid else None,
            "parts": {part: column[i] for part, column in parts.items() if valid and math.isfinite(column[i])},
            "reason": "" if valid else reasons[i].removeprefix(f"{name}: "),
        }
        for i, ((file, example, _), value, valid) in enumerate(
            zip(batch, scores.values.tolist(), scores.valid.tolist(), strict=True)
        )
    ]
