"""Prompts, and streams over them and over captioned images, whose position is a single number."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.records import PreferencePairs

T = TypeVar("T")


class Images(ABC):
    """Captioned images. `[data] images` names a place of files, or a subclass as "package.module:Class"."""

    @abstractmethod
    def batch(self, start: int, size: int, seed: int) -> tuple[Tensor, list[str]]:
        """Images (size, 3, H, W) float32 in [0, 1] and captions at positions start .. of the stream of `seed`."""


def find_class(source: str, base: type[T], key: str, expected: str) -> Callable[[int], T]:
    """The class that `source` names as "package.module:Class", or a function there that gives one of its kind.

    Raises ConfigError with `key` and what else was `expected` there.
    """
    module, _, name = source.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module of the user's may raise anything
        raise ConfigError(f'{key}: {source!r} is {expected}, and no "package.module:Class" ({error})') from error
    if not (issubclass(found, base) if isinstance(found, type) else callable(found)):
        raise ConfigError(f"{key}: {source} is no {base.__module__}.{base.__qualname__}")
    chosen: Callable[[int], T] = found
    return chosen


def open_class(source: str, size: int, base: type[T], key: str, expected: str) -> T:
    """What that class gives for images of `size` pixels. Raises ConfigError for a size that it refuses as well."""
    try:
        found = find_class(source, base, key, expected)(size)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{key}: {source} does not open ({error})") from error
    if not isinstance(found, base):
        raise ConfigError(f"{key}: {source} gives no {base.__module__}.{base.__qualname__}")
    return found


class Preferences(ABC):
    """Preference pairs. `[data] pairs` names a folder or a file, or a subclass of this as "package.module:Class"."""

    notes: Sequence[str] = ()
    """What the user is to know of them before the first update."""

    @abstractmethod
    def batch(self, start: int, size: int, seed: int) -> PreferencePairs:
        """The pairs at positions start .. start + size of the stream of `seed`."""
