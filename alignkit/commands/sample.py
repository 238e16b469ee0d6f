"""Generate images into a folder that `score`, `pairs` and `data.images` read."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from alignkit.data.image_files import GRID, METADATA
from alignkit.errors import ConfigError
from alignkit.files import write_file, writing
from alignkit.runs.folder import free
from alignkit.runs.grid import draw_grid, reduced, step_words

if TYPE_CHECKING:
    from alignkit.runs.run import Run

FOLDER = Path("samples")
ROWS, COLUMNS = 24, 12
"""Most prompts and images of a prompt in the grid."""


def sample(
    run: Run,
    prompts: Sequence[str],
    out: Path | None = None,
    *,
    steps: Sequence[int] | None = None,
    seed: int = 0,
    count: int = 1,
) -> Iterator[Path]:
    """Generate `count` images of each prompt at each number of steps; yield the path of every file as it is written.

    `out` is a new or empty folder; None: the first of samples, samples-2, ... that is. `steps` None: as the run has
    it. Image c of prompt p starts from the noise of (seed, p * count + c) at every number of steps. A line of
    `metadata.jsonl` is written after the image that it names, so the output of an interrupted call can be read; the
    PNG itself holds the same as text chunks. The last file is a grid of the first prompts. Raises ConfigError, before
    weights load and without leaving a folder, for blank prompts, steps that the sampler cannot take, a run without a
    checkpoint, and an `out` that is not empty.
    """
    _check_prompts(prompts)
    numbers = [run.sampler().num_steps] if steps is None else list(dict.fromkeys(steps))
    run.check_steps(numbers)
    folder = free(FOLDER) if out is None else out
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--out {folder}: exists already; choose another folder")
    new = not folder.exists()
    origin = {"model": run.config.model.name, "run": str(run.folder) if run.has_folder else ""}
    small: list[list[Tensor]] = [[] for _ in prompts[:ROWS]]
    across = max(1, COLUMNS // len(numbers))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        table = (folder / METADATA).open("x", encoding="utf-8")
    with table:
        try:
            run.policy()
        except BaseException:
            _take_back(folder, new)
            raise
        for number in numbers:
            images = (image for batch in run.sample_batches(prompts, number, seed, count) for image in batch)
            for place, image in enumerate(images):
                prompt, copy = divmod(place, count)
                name = _name(prompt, len(prompts), copy, count, number if steps is not None else None)
                facts = {"seed": seed, "noise": place, "steps": number, **origin}
                with writing(folder):
                    image.save(folder / name, pnginfo=_chunks({"prompt": prompts[prompt], **facts}))
                    line = {"file_name": name, "text": prompts[prompt], **facts}
                    table.write(json.dumps(line, ensure_ascii=False) + "\n")
                    table.flush()
                if prompt < ROWS and copy < across:
                    small[prompt].append(reduced(image))
                yield folder / name
    shown = range(1, min(count, across) + 1)
    columns = [step_words(n) + (f", no. {c}" if len(shown) > 1 else "") for n in numbers for c in shown]
    content = io.BytesIO()
    draw_grid(torch.stack([torch.stack(row) for row in small]), prompts[:ROWS], columns).save(content, "PNG")
    write_file(folder / GRID, content.getvalue())
    yield folder / GRID


def _check_prompts(prompts: Sequence[str]) -> None:
    """Raise ConfigError for a prompt that files of captions cannot hold."""
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise ConfigError(f"PROMPT {number}: found {prompt!r}, expected text")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # bytes of a command line that are no UTF-8
            raise ConfigError(
                f"PROMPT {number}: found {prompt[error.start]!a} at character {error.start + 1}, expected UTF-8 text"
            ) from error


def _take_back(folder: Path, new: bool) -> None:
    """Remove what was made before the model failed to load, so that the next call takes the same folder."""
    with suppress(OSError):  # the error that ended the call is reported, not this one
        (folder / METADATA).unlink()
        if new:
            folder.rmdir()


def _name(prompt: int, prompts: int, copy: int, copies: int, steps: int | None) -> str:
    """Return the name of an image; in the order of names, those of a prompt are consecutive."""
    at = "" if steps is None else f"_{steps}steps"
    return f"{prompt:0{max(3, len(str(prompts - 1)))}d}{at}_{copy:0{len(str(copies - 1))}d}.png"


def _chunks(facts: Mapping[str, Any]) -> PngInfo:
    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, str(value))
    return info
