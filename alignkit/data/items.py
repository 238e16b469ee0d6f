"""A data set of numbered items that are read on demand; broken ones are refused or skipped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

from alignkit.data.decode import UNREADABLE
from alignkit.data.stream import Stream
from alignkit.data.text import leave_out
from alignkit.errors import ConfigError

T = TypeVar("T")


class Items(ABC, Generic[T]):
    """A finite number of images or of pairs, found by number and read when their turn comes.

    One that cannot be read is a ConfigError that names it. With a list `skipped` it is noted there once instead, and
    the next one that can be read stands in its place, so that what stands at a position never depends on the past.
    """

    key: ClassVar[str]
    """The key of the run file that names them."""

    def __init__(self, skipped: list[str] | None = None) -> None:
        self._skipped = skipped
        self._broken: set[int] = set()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Where it lies: file, line or member."""

    @abstractmethod
    def load(self, index: int) -> T:
        """Its images, each (3, H, W) float32 in [0, 1], and its text. Raises one of `UNREADABLE`."""

    def read(self, index: int) -> T | None:
        """What `load` gives; None if it is broken and such are skipped."""
        if index in self._broken:
            return None
        try:
            return self.load(index)
        except UNREADABLE as error:
            reason = str(error) or type(error).__name__
            leave_out(self._skipped, self.key, f"{self.name(index)} cannot be read ({reason})")
            self._broken.add(index)
            return None

    def at(self, start: int, size: int, seed: int) -> list[T]:
        """What stands at positions start .. start + size of the stream of `seed`."""
        indices = Stream(len(self), seed).indices(start, size)
        # In the order of the files: what lies together is read together.
        found = {index: self._whole(index) for index in sorted(set(indices))}
        return [found[index] for index in indices]

    def _whole(self, index: int) -> T:
        for place in range(index, index + len(self)):
            if (found := self.read(place % len(self))) is not None:
                return found
        raise ConfigError(f"{self.key}: none of {len(self)} can be read; the first is {self.name(0)}")
