"""Tokens of a prompt, by the tokenizers of a pipeline on this disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from alignkit.config.bundles import INDEX, read_index
from alignkit.models.fit import read_tokenizer
from alignkit.models.pipelines import Files, configs_folder


def token_counter(source: str, config: str = "") -> Callable[[str], tuple[int, int]] | None:
    """Return a function that returns the number of tokens that the text encoders of a pipeline read, and the number in
    a text. The tokenizers are read when it is first called. None where the pipeline is not on this disk."""
    folder = configs_folder(Files(source, config=config))
    return None if folder is None or not (folder / INDEX).is_file() else lambda text: _count(folder, text)


def _count(folder: Path, text: str) -> tuple[int, int]:
    index = read_index(folder)
    names = [name for name in ("tokenizer", "tokenizer_2") if (index.get(name) or [None])[0]]
    tokenizers = [read_tokenizer(folder, name, index[name][1]) for name in names]
    found = [(one.model_max_length, len(one(text, verbose=False).input_ids)) for one in tokenizers]
    return max(found, key=lambda one: one[1] - one[0], default=(0, 0))
