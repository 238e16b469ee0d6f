"""Interfaces for captioned images and preference pairs, and loading of user classes that implement them."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.imports import import_name
from alignkit.records import Example, PreferencePairs

T = TypeVar("T")


class Images(ABC):
    """Captioned images. `[data] images` names files, a data set, or a subclass of this as "package.module:Class"."""

    @abstractmethod
    def batch(self, start: int, size: int, seed: int) -> tuple[Tensor, Sequence[str | Example]]:
        """Return images (size, 3, H, W) float32 in [0, 1] with captions, from `start` of the stream of `seed`.

        A caption is a text, or an example if a reward needs to know more about the image.
        """


def find_class(source: str, base: type[T], key: str, expected: str) -> Callable[[int], T]:
    """Import the subclass of `base` that `source` names as "package.module:Class", or a function that returns one.

    Raises ConfigError, which names the setting `key` and says what else was `expected`.
    """
    try:
        found: Any = import_name(source)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise ConfigError(
            f'{key}: found {source!r}, expected {expected}, or "package.module:Class" ({error})'
        ) from error
    fits = issubclass(found, base) if isinstance(found, type) else callable(found) and not inspect.isbuiltin(found)
    if not fits:
        raise ConfigError(f"{key}: {source} is not an {base.__module__}.{base.__qualname__}")
    chosen: Callable[[int], T] = found
    return chosen


def open_class(source: str, size: int, base: type[T], key: str, expected: str) -> T:
    """Open the source that `find_class` finds, for images of `size` pixels.

    Raises ConfigError if the class raises ValueError or TypeError, for example for a size that it does not support.
    """
    try:
        found = find_class(source, base, key, expected)(size)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{key}: {source} cannot be opened ({error})") from error
    if not isinstance(found, base):
        kind = f"{base.__module__}.{base.__qualname__}"
        raise ConfigError(f"{key}: {source} returns {type(found).__name__}, expected {kind}")
    return found


class Preferences(ABC):
    """Preference pairs. `[data] pairs` names a folder or a file, or a subclass of this as "package.module:Class"."""

    notes: Sequence[str] = ()
    """Messages about the data that are shown before the first update."""

    @abstractmethod
    def batch(self, start: int, size: int, seed: int) -> PreferencePairs:
        """Return the pairs at positions start .. start + size of the stream of `seed`."""
