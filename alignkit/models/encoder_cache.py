"""What encoders made of texts and images, kept on disk so that it is made once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from alignkit.files import write_file


class EncoderCache:
    """Entries `folder/<encoder>/<two digits>/<content>.safetensors`, bit for bit what the encoder gave.

    `encoder` tells encoders apart by their weights and `content` is a hash of what was encoded, so a stale entry is
    never found. Entries are written whole under a name of their own and renamed: processes may share a folder, and one
    that is killed leaves no half of an entry. An entry that cannot be read is made again.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.made = 0
        """Entries that were not there."""

    def get(self, encoder: str, content: str, encode: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The entry, on the CPU; made by `encode` and kept if it is not there.

        Raises AlignkitError if the disk refuses it.
        """
        path = self.folder / encoder / content[:2] / f"{content}.safetensors"
        with suppress(OSError, SafetensorError):  # not there, or damaged: both are mended by making it
            return load_file(path)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in encode().items()}
        write_file(path, save(tensors))
        self.made += 1
        return tensors

    def size(self, encoder: str) -> tuple[int, int]:
        """Entries of an encoder, and their bytes on disk."""
        sizes = [path.stat().st_size for path in (self.folder / encoder).glob("*/*.safetensors")]
        return len(sizes), sum(sizes)


def fingerprint(parts: Iterable[torch.nn.Module | str]) -> str:
    """32 digits that tell modules apart by their class, config and every weight, and strings by what they say."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, str):
            digest.update(f"{len(part)} {part}".encode())
            continue
        config: Any = part.config
        values = config if isinstance(config, dict) else config.to_dict()
        kept = {name: value for name, value in values.items() if name not in LOOSE}
        digest.update(f"{type(part).__name__} {json.dumps(kept, sort_keys=True, default=str)}".encode())
        for name, tensor in part.state_dict().items():
            digest.update(f"{name} {_shape(tensor)}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


LOOSE = frozenset({"_name_or_path", "_diffusers_version", "transformers_version", "dtype"})
"""Entries of a config that say where a model came from, or what its weights say themselves."""


def tokenizer_state(tokenizer: Any) -> str:
    """How a tokenizer of transformers reads a text: its vocabulary, rules, special tokens and length."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in ("truncation", "padding"):  # set by each call, and so by what was read before
        state.pop(name, None)
    kept = [state, tokenizer.special_tokens_map, tokenizer.model_max_length, tokenizer.padding_side]
    return json.dumps(kept, sort_keys=True, default=str)


def content_of(value: str | Tensor) -> str:
    """32 digits that tell texts apart, or tensors by shape, type and every value."""
    if isinstance(value, str):
        return hashlib.blake2b(value.encode(errors="surrogatepass"), digest_size=16).hexdigest()
    digest = hashlib.blake2b(_shape(value).encode(), digest_size=16)
    digest.update(_bytes(value))
    return digest.hexdigest()


def _shape(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} "


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
