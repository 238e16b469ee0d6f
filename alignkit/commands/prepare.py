"""Encode the prompts, captions and images of a run ahead of time, into the cache of `[data] cache`."""

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
    """The entries of one encoder in the cache."""

    what: str
    """"texts" or "images"."""
    read: int
    """Distinct texts of the run, or images of its data set or pairs."""
    encoded: int
    """Entries that were added."""
    folder: str
    """Folder of the encoder's entries."""
    entries: int
    """Number of entries, including those of other data."""
    bytes: int
    """Their size on disk."""


def prepare(run: Run, console: Console | None = None) -> tuple[list[Prepared], list[str]]:
    """Encode the training and held-out prompts of a run, and its images or pairs with their texts.

    Existing entries are kept, so an interrupted call can be repeated. Shows progress on `console`. Also returns lines
    for the user: the data that was skipped as broken, and how many items. Raises AlignkitError for mistakes that the
    user can fix.
    """
    if not run.config.data.cache:
        raise ConfigError("data.cache: missing; name a folder for the encoded data")
    run.check()
    skipped = run.skipped()
    # Guidance needs the empty prompt.
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
            notes.append(f"{key}: {name} is an endless stream, so none of it is encoded ahead of time")
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
