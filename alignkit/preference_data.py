"""Preference pairs as data: two pictures of one text each, the preferred one first."""

from __future__ import annotations

import importlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from alignkit.data import Stream, middle_square
from alignkit.errors import AlignkitError, ConfigError
from alignkit.interfaces import PreferencePairs

TABLE = "pairs.jsonl"
"""The table of a folder of pairs."""
NAMED = 20
"""Broken pairs that are named; of more, how many there are is told."""


class Preferences(ABC):
    """Preference pairs. `[data] pairs` names a folder or a file, or a subclass of this as "package.module:Class"."""

    notes: Sequence[str] = ()
    """What the user is to know: which pairs could not be read, with their lines, and how many prefer neither."""

    @abstractmethod
    def batch(self, start: int, size: int, seed: int) -> PreferencePairs:
        """The pairs at positions start .. start + size of the stream of `seed`."""


@dataclass(frozen=True, slots=True)
class Row:
    """Where a pair stands; small, for there may be a million."""

    file: Path
    line: int
    """Line of the file, or row; the first is 1."""
    caption: str
    winner: Any
    """Where in or beside the file the picture is, as the table understands it."""
    loser: Any


class PairTable(Preferences):
    """Pairs of a table that fits into memory, without the pictures; those are read when their turn comes.

    Pictures are cropped to the middle square and resized to `size` pixels. What cannot be read ends the run with
    `broken` "refuse"; with "skip" it is named in `notes`, and the next row of the table takes its place, so that what
    stands at a position depends on the seed and the files alone.
    """

    def __init__(self, source: Path, size: int, broken: str) -> None:
        self.source, self.size, self.skip = source, size, broken == "skip"
        self.notes: list[str] = []
        self._broken: set[int] = set()
        self.rows: list[Row] = []
        problems: list[str] = []
        for row in self._read_table():
            if isinstance(row, Row):
                self.rows.append(row)
            else:
                problems.append(row)
        if problems and not self.skip:
            raise ConfigError("\n".join([*_first(problems), 'data.broken: set it to "skip" to leave such pairs out']))
        self.notes += [f"{problem}; left out" for problem in _first(problems)]
        if not self.rows:
            raise ConfigError(f"data.pairs: {source} holds no pair of which one picture is preferred and can be read")

    @abstractmethod
    def _read_table(self) -> Iterator[Row | str]:
        """Every row, or what is wrong with it."""

    @abstractmethod
    def _open(self, row: Row, found: Any) -> Path | io.BytesIO:
        """The file or the bytes of a picture of this row. Raises OSError or ValueError."""

    def batch(self, start: int, size: int, seed: int) -> PreferencePairs:
        chosen = Stream(len(self.rows), seed).indices(start, size)
        # In the table's order: rows of a parquet file that lie together are read together.
        pairs = {index: self._readable(index) for index in sorted(set(chosen))}
        winners, losers, captions = zip(*(pairs[index] for index in chosen), strict=True)
        return PreferencePairs(torch.stack(winners), torch.stack(losers), captions)

    def _readable(self, index: int) -> tuple[Tensor, Tensor, str]:
        """The pair at `index`; where it is broken and may be skipped, the next one that is not."""
        for place in range(index, index + len(self.rows)):
            place %= len(self.rows)
            row = self.rows[place]
            if place in self._broken:
                continue
            try:
                return self._picture(row, row.winner), self._picture(row, row.loser), row.caption
            except AlignkitError as error:
                if not self.skip:
                    raise
                self._broken.add(place)
                self._note(f"{error}; left out")
        raise AlignkitError(f"data.pairs: {self.source} holds no pair that can be read")

    def _picture(self, row: Row, found: Any) -> Tensor:
        try:
            with Image.open(self._open(row, found)) as opened:
                return middle_square(opened.convert("RGB"), self.size)
        # What Pillow raises for files that are cut short, altered, of no format it knows, or too large to be meant.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            where, name = f"{row.file}, line {row.line}", found if isinstance(found, str) else found[-1]
            raise AlignkitError(f"data.pairs: {where}: {name} cannot be read as a picture ({error})") from error

    def _note(self, text: str) -> None:
        if len(self._broken) <= NAMED:
            self.notes.append(text)
        elif len(self._broken) == NAMED + 1:
            self.notes.append(f"data.pairs: more than {NAMED} pairs of {self.source} cannot be read and are left out")


class JsonPairs(PairTable):
    """A .jsonl file, one object a line: "text", and "winner" and "loser", files named from where it lies."""

    def _read_table(self) -> Iterator[Row | str]:
        try:
            # Not splitlines, which also ends lines at characters that JSON strings may hold.
            lines = self.source.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"data.pairs: {self.source} cannot be read ({error})") from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield self._row(number, line)

    def _row(self, number: int, line: str) -> Row | str:
        where = f"{self.source}, line {number}"
        try:
            record = json.loads(line)
            text, winner, loser = (record[key] for key in ("text", "winner", "loser"))
            if not all(isinstance(value, str) for value in (text, winner, loser)):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            expected = 'a JSON object with "text", "winner" and "loser", all strings'
            return f"data.pairs: {where}: expected {expected}, found {line[:60]!r}"
        for name in (winner, loser):
            if not (self.source.parent / name).is_file():
                return f"data.pairs: {where}: there is no file {self.source.parent / name}"
        if winner == loser:
            return f"data.pairs: {where}: winner and loser are the same file, {winner}"
        return Row(self.source, number, text, winner, loser)

    def _open(self, row: Row, found: Any) -> Path:
        return row.file.parent / str(found)


class ParquetPairs(PairTable):
    """Parquet in the columns of Pick-a-Pic: caption, jpg_0, jpg_1 (a file's bytes), label_0 of 1 or 0, maybe label_1.

    A label of .5, and none at all, prefers neither picture: such rows are left out, as Diffusion-DPO does, and counted
    in `notes`. Pictures are read a row group at a time; small row groups make for quick reading in random order.
    """

    def __init__(self, source: Path, size: int, broken: str) -> None:
        self._parquet = _parquet()
        self._group: tuple[tuple[Path, int], Any] | None = None
        super().__init__(source, size, broken)

    def _read_table(self) -> Iterator[Row | str]:
        files = [self.source] if self.source.is_file() else sorted(self.source.glob("*.parquet"))
        count = undecided = 0
        for file in files:
            for line, (group, place, record) in enumerate(self._records(file), start=1):
                count += 1
                caption, first, second = (record.get(name) for name in ("caption", "label_0", "label_1"))
                # A row that nobody labelled has no label, or one that is not a number.
                if record.get("has_label") is False or first is None or first != first or first == 0.5:
                    undecided += 1
                elif first not in (0, 1) or second not in (None, 1 - first):
                    yield f"data.pairs: {file}, line {line}: label_0 is {first} and label_1 {second}, expected 1 and 0"
                elif not isinstance(caption, str):
                    yield f"data.pairs: {file}, line {line}: caption is {caption!r}, expected a text"
                else:
                    names = ("jpg_0", "jpg_1") if first else ("jpg_1", "jpg_0")
                    yield Row(file, line, caption, *((group, place, name) for name in names))
        if undecided:
            self.notes.append(
                f"data.pairs: {undecided} of {count} rows of {self.source} prefer neither picture and are left out"
            )

    def _records(self, file: Path) -> Iterator[tuple[int, int, Mapping[str, Any]]]:
        """Row group, place in it, and values of each row, the pictures left out."""
        with self._opened(file) as opened:
            names = set(opened.schema_arrow.names)
            if missing := {"caption", "jpg_0", "jpg_1", "label_0"} - names:
                raise ConfigError(
                    f"data.pairs: {file} has no column {', '.join(sorted(missing))}; expected caption, jpg_0, jpg_1 "
                    "and label_0, as Pick-a-Pic has them"
                )
            columns = sorted(names & {"caption", "label_0", "label_1", "has_label"})
            for group in range(opened.num_row_groups):
                try:
                    table = opened.read_row_group(group, columns=columns)
                except (OSError, ValueError) as error:
                    raise ConfigError(f"data.pairs: {file} is damaged ({error})") from error
                for place, record in enumerate(table.to_pylist()):
                    yield group, place, record

    def _opened(self, file: Path) -> Any:
        try:
            return self._parquet.ParquetFile(file)
        except (OSError, ValueError) as error:  # pyarrow's own errors are of these
            raise ConfigError(f"data.pairs: {file} cannot be read as parquet ({error})") from error

    def _open(self, row: Row, found: Any) -> io.BytesIO:
        group, place, column = found
        if self._group is None or self._group[0] != (row.file, group):
            with self._opened(row.file) as opened:
                self._group = (row.file, group), opened.read_row_group(group, columns=["jpg_0", "jpg_1"])
        value = self._group[1].column(column)[place].as_py()
        # The datasets library keeps a picture as its bytes beside the path that it had.
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise OSError(f"found {type(data).__name__}, expected the bytes of a file")
        return io.BytesIO(data)


def open_pairs(source: str, size: int, broken: str = "refuse") -> Preferences:
    """What `[data] pairs` names, at `size` pixels. Raises ConfigError, with a line for every broken pair."""
    path = Path(source)
    if path.is_file() and path.suffix == ".jsonl":
        return JsonPairs(path, size, broken)
    if path.is_dir() and (path / TABLE).is_file():
        return JsonPairs(path / TABLE, size, broken)
    if (path.is_file() and path.suffix == ".parquet") or (path.is_dir() and any(path.glob("*.parquet"))):
        return ParquetPairs(path, size, broken)
    if path.exists():
        raise ConfigError(
            f"data.pairs: {source} holds no preference pairs; expected a folder with {TABLE} or .parquet files, or "
            "such a file"
        )
    module, _, name = source.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)(size)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(
            f'data.pairs: {source!r} is no folder, no file and no "package.module:Class" of preference pairs ({error})'
        ) from error
    if not isinstance(found, Preferences):
        raise ConfigError(f"data.pairs: {source} is no alignkit.preference_data.Preferences")
    return found


def check_pairs(source: str, broken: str) -> None:
    """Raise ConfigError for a table with broken rows or missing files, as `open_pairs` would; reads no picture."""
    if Path(source).exists() or ":" not in source:
        open_pairs(source, 1, broken)


def _first(problems: list[str]) -> list[str]:
    """The first of many, and how many more there are."""
    rest = len(problems) - NAMED
    return problems[:NAMED] + ([f"data.pairs: {rest} more of this kind"] if rest > 0 else [])


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            'data.pairs: reading .parquet needs pyarrow, which is not installed: pip install "alignkit[parquet]"'
        ) from error
    return pyarrow.parquet
