"""Read the items of a data set on demand; raise an error for unreadable ones, or skip them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

from alignkit.data.decode import UNREADABLE
from alignkit.data.stream import Stream
from alignkit.data.text import leave_out
from alignkit.errors import ConfigError

T = TypeVar("T")


class Items(ABC, Generic[T]):
    """An indexed set of images or pairs, each loaded only when it is needed.

    An item that cannot be read raises a ConfigError that names it. If a list `skipped` is given, the item is noted
    there once instead and replaced by the next readable item, so the item at a position never depends on earlier reads.
    """

    key: ClassVar[str]
    """The run-file key that names this set, for messages."""

    def __init__(self, skipped: list[str] | None = None) -> None:
        self._skipped = skipped
        self._unreadable: set[int] = set()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the location of an item for messages: file, line or archive member."""

    @abstractmethod
    def load(self, index: int) -> T:
        """Load an item: its images, each (3, H, W) float32 in [0, 1], and its caption. Raises one of `UNREADABLE`."""

    def read(self, index: int) -> T | None:
        """Load an item, or return None if it cannot be read and unreadable items are skipped."""
        if index in self._unreadable:
            return None
        try:
            return self.load(index)
        except UNREADABLE as error:
            reason = str(error) or type(error).__name__
            leave_out(self._skipped, self.key, f"{self.name(index)} cannot be read ({reason})")
            self._unreadable.add(index)
            return None

    def at(self, start: int, size: int, seed: int) -> list[T]:
        """Load the items at positions start .. start + size of the stream shuffled by `seed`."""
        indices = Stream(len(self), seed).indices(start, size)
        # In file order, so that neighbouring items are read together.
        found = {index: self._readable(index) for index in sorted(set(indices))}
        return [found[index] for index in indices]

    def _readable(self, index: int) -> T:
        """Load item `index`, or the next readable one after it."""
        for place in range(index, index + len(self)):
            if (found := self.read(place % len(self))) is not None:
                return found
        raise ConfigError(f"{self.key}: none of the {len(self)} items can be read; the first is {self.name(0)}")
