"""Encoding ahead of time what a run will read: prompts, captions and images into the cache of `[data] cache`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from alignkit.data.items import Items
from alignkit.errors import ConfigError
from alignkit.runs.run import Run


@dataclass(frozen=True)
class Prepared:
    """What lies in the cache from one encoder."""

    what: str
    """"texts" or "images"."""
    read: int
    """Distinct texts of the run, or images of its set or its pairs."""
    encoded: int
    """Those that were not there before."""
    folder: str
    """Where the encoder's entries lie."""
    entries: int
    """How many there are, those of other data included."""
    bytes: int
    """Their size on disk."""


def prepare(run: Run, console: Console | None = None) -> tuple[list[Prepared], list[str]]:
    """Encode the run's prompts and held-out prompts, and the images or pairs, with their texts, that it learns from.

    What is in the cache already is left as it is, so an interrupted call goes on where it was. Shows its progress on
    `console`. Also returns lines for the user: what was skipped as broken, and how many that were. Raises AlignkitError
    for what the user can mend.
    """
    if not run.config.data.cache:
        raise ConfigError("data.cache: missing; name the folder that is to keep what is encoded")
    run.check()
    skipped = run.skipped()
    # "" is what guidance leads away from.
    texts = dict.fromkeys(["", *(example.text for example in (*run.prompts(skipped), *run.held_out()))])
    policy = run.load_policy(run.accelerator().device)
    cache = policy.cache
    assert cache is not None
    sources = {
        "data.images": (run.config.data.images, run.images(policy.image_size, skipped)),
        "data.pairs": (run.config.data.pairs, run.pairs(policy.image_size, skipped)),
    }
    notes: list[str] = []
    sets: list[Items[Any]] = []
    for key, (name, opened) in sources.items():
        if isinstance(opened, Items):
            sets.append(opened)
        elif opened is not None:
            notes.append(f"{key}: {name} has no end, so none of it is encoded ahead")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    done = []
    with Progress(*columns, console=console, disable=console is None) as progress:
        for items in sets:
            read = 0
            for index in progress.track(range(len(items)), description="images"):
                if (found := items.read(index)) is not None:
                    *images, text = found
                    policy.encode_images(torch.stack(images))
                    texts[text] = None
                    read += len(images)
            folder = policy.encoders["images"]
            done.append(Prepared("images", read, cache.made, str(cache.folder / folder), *cache.size(folder)))
        made = cache.made
        for text in progress.track(list(texts), description="texts"):
            policy.encode([text])
        folder = policy.encoders["texts"]
        done.append(Prepared("texts", len(texts), cache.made - made, str(cache.folder / folder), *cache.size(folder)))
    notes += [f"skipped as broken: {what}" for what in skipped or ()]
    return done, notes + ([f"{len(skipped)} skipped as broken"] if skipped else [])
