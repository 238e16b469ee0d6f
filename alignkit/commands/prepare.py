"""Encode the prompts, captions and images of a run ahead of time, into the cache of `[data] cache`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from alignkit.data.items import Items
from alignkit.errors import ConfigError
from alignkit.models.encoder_cache import EncoderCache
from alignkit.records import Example
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
    cache = run.encoder_cache()
    if cache is None:
        raise ConfigError("data.cache: missing; name a folder for the encoded data")
    run.check(servers=False)
    skipped = run.skipped()
    # Guidance needs the empty prompt.
    texts = dict.fromkeys(
        ["", *(example.text for example in (*run.prompts(skipped), *run.held_out(), *run.point_examples()))]
    )
    policy = run.load_policy(run.accelerator().device, cache)
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
            cache.start_count()
            for index in progress.track(range(len(items)), description="images"):
                if (found := items.read(index)) is not None:
                    *images, caption = found
                    policy.encode_images(torch.stack(images))
                    texts[Example.of(caption).text] = None
                    read += len(images)
            done.append(_prepared("images", read, cache))
        cache.start_count()
        for text in progress.track(list(texts), description="texts"):
            policy.encode([text])
        done.append(_prepared("texts", len(texts), cache))
    if not cache.encoders:
        notes.append(f"data.cache: the model {run.config.model.name} keeps nothing there, so nothing was prepared")
    notes += [f"skipped as broken: {what}" for what in skipped or ()]
    return done, notes + ([f"{len(skipped)} skipped as broken"] if skipped else [])


def _prepared(what: str, read: int, cache: EncoderCache) -> Prepared:
    """The count of one encoder, the one that was used since the last `start_count`."""
    encoder = next(iter(cache.encoders), "")
    entries, size = cache.size(encoder) if encoder else (0, 0)
    return Prepared(what, read, cache.made, str(cache.folder / encoder), entries, size)
