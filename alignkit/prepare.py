"""Encoding ahead of time what a run will read: prompts, captions and pictures into the cache of `[data] cache`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from alignkit.errors import ConfigError
from alignkit.parts import Parts
from alignkit.pictures import PictureSet


@dataclass(frozen=True)
class Prepared:
    """What lies in the cache from one encoder."""

    what: str
    """"texts" or "pictures"."""
    read: int
    """Distinct texts of the run, or pictures of its set."""
    encoded: int
    """Those that were not there before."""
    folder: str
    """Where the encoder's entries lie."""
    entries: int
    """How many there are, those of other data included."""
    bytes: int
    """Their size on disk."""


def prepare(
    parts: Parts, device: torch.device | str, console: Console | None = None
) -> tuple[list[Prepared], list[str]]:
    """Encode the run's prompts and held-out prompts, and its pictures with their captions if the algorithm reads such.

    What is in the cache already is left as it is, so an interrupted call goes on where it was. Shows its progress on
    `console`. Also returns lines for the user: what was skipped as broken, and how many that were. Raises AlignkitError
    for what the user can mend.
    """
    if not parts.config.data.cache:
        raise ConfigError("data.cache: missing; name the folder that is to keep what is encoded")
    parts.check()
    skipped = parts.skipped()
    # "" is what guidance leads away from.
    texts = dict.fromkeys(["", *(example.text for example in (*parts.prompts(skipped), *parts.held_out()))])
    policy = parts.load_policy(device)
    cache = policy.cache
    assert cache is not None
    pictures = parts.pictures(policy.image_size, skipped)
    notes = []
    if pictures is not None and not isinstance(pictures, PictureSet):
        notes.append(f"data.pictures: {parts.config.data.pictures} has no end, so none of it is encoded ahead")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    done = []
    with Progress(*columns, console=console, disable=console is None) as progress:
        if isinstance(pictures, PictureSet):
            read = 0
            for index in progress.track(range(len(pictures)), description="pictures"):
                if (found := pictures.read(index)) is not None:
                    policy.encode_images(found[0][None])
                    texts[found[1]] = None
                    read += 1
            folder = policy.encoders["pictures"]
            done.append(Prepared("pictures", read, cache.made, str(cache.folder / folder), *cache.size(folder)))
        made = cache.made
        for text in progress.track(list(texts), description="texts"):
            policy.encode([text])
        folder = policy.encoders["texts"]
        done.append(Prepared("texts", len(texts), cache.made - made, str(cache.folder / folder), *cache.size(folder)))
    notes += [f"skipped as broken: {what}" for what in skipped or ()]
    return done, notes + ([f"{len(skipped)} skipped as broken"] if skipped else [])
