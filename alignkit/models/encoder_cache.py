"""Encoded texts and images on disk, so that each is encoded once."""

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
    """Entries `folder/<encoder>/<two digits>/<content>.safetensors`, bit for bit what the encoder returned.

    `encoder` changes with the encoder's weights and `content` is a hash of the text or image, so a stale entry is never
    found. Entries are written under a temporary name and renamed: processes may share a folder, and a killed one leaves
    no partial entry. An entry that cannot be read is made again.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.made = 0
        """Entries that were missing and were made."""
        self.encoders: dict[str, None] = {}
        """Names of the encoders whose entries were read or made, in the order of their first use."""

    def start_count(self) -> None:
        """Count `made` and `encoders` from here on."""
        self.made, self.encoders = 0, {}

    def get(self, encoder: str, content: str, encode: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the entry, on the CPU; make it with `encode` and keep it if it is missing.

        Raises AlignkitError if it cannot be written.
        """
        self.encoders[encoder] = None
        path = self.folder / encoder / content[:2] / f"{content}.safetensors"
        with suppress(OSError, SafetensorError):  # missing or damaged: it is made below
            return load_file(path)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in encode().items()}
        write_file(path, save(tensors))
        self.made += 1
        return tensors

    def size(self, encoder: str) -> tuple[int, int]:
        """Return the number of entries of an encoder, and their bytes on disk."""
        sizes = [path.stat().st_size for path in (self.folder / encoder).glob("*/*.safetensors")]
        return len(sizes), sum(sizes)


def fingerprint(parts: Iterable[torch.nn.Module | str]) -> str:
    """Return a hash of 32 digits over the class, config and every weight of modules, and over strings."""
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
"""Entries of a config that name the origin of a model, or repeat what its weights show."""


def tokenizer_state(tokenizer: Any) -> str:
    """Return all that determines the tokens of a transformers tokenizer, as JSON: vocabulary, rules, length."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in ("truncation", "padding"):  # state of the last call
        state.pop(name, None)
    kept = [state, tokenizer.special_tokens_map, tokenizer.model_max_length, tokenizer.padding_side]
    return json.dumps(kept, sort_keys=True, default=str)


def content_of(value: str | Tensor) -> str:
    """Return a hash of 32 digits over a text, or over the shape, type and every value of a tensor."""
    if isinstance(value, str):
        return hashlib.blake2b(value.encode(errors="surrogatepass"), digest_size=16).hexdigest()
    digest = hashlib.blake2b(_shape(value).encode(), digest_size=16)
    digest.update(_bytes(value))
    return digest.hexdigest()


def _shape(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} "


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
