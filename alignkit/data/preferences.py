"""Preference pairs as data: two images per text, the preferred one first."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignkit.data.decode import UNREADABLE, read_image
from alignkit.data.items import Items
from alignkit.data.sources import Preferences, find_class, open_class
from alignkit.data.text import json_object, leave_out, read_lines, text_column, too_long
from alignkit.errors import ConfigError
from alignkit.records import PreferencePairs

KEY = "data.pairs"
TABLE = "pairs.jsonl"
"""File name of the table in a folder of pairs."""
IMAGES = "images"
"""Name of the folder next to it in which commands save the images."""
EXPECTED = "a folder or a file of pairs"


@dataclass(frozen=True, slots=True)
class Row:
    """Locate one pair. Kept small, because a table may have a million rows."""

    name: str
    """File and line or row, for messages."""
    caption: str
    winner: Any
    """Location of the preferred image, in the form that the table's `_stored` takes."""
    loser: Any


class PairTable(Items[tuple[Tensor, Tensor, str]], Preferences):
    """Pairs from a table that is held in memory; the images are loaded when they are needed.

    Images are cropped to the middle square and resized to `size` pixels. A broken row raises ConfigError, or, if a list
    `skipped` is given, is noted there and left out; a row whose image cannot be loaded is replaced by the next one.
    """

    key = KEY

    def __init__(self, source: Path, size: int, skipped: list[str] | None = None) -> None:
        super().__init__(skipped)
        self.source, self.size = source, size
        self.rows = list(self._read_table())
        if not self.rows:
            raise ConfigError(f"{KEY}: {source} contains no readable pair with a preferred image")

    @abstractmethod
    def _read_table(self) -> Iterator[Row]:
        """Yield every complete row that prefers one of its images."""

    def _note_undecided(self, undecided: int, count: int) -> None:
        if undecided:
            self.notes = [f"{KEY}: {undecided} of {count} rows of {self.source} prefer neither image and were left out"]

    @abstractmethod
    def _stored(self, location: Any) -> bytes:
        """Return the bytes of the image file at `location`. Raises OSError or ValueError."""

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.rows[index].name

    def load(self, index: int) -> tuple[Tensor, Tensor, str]:
        row = self.rows[index]
        return self._image(row.winner), self._image(row.loser), row.caption

    def _image(self, location: Any) -> Tensor:
        try:
            return read_image(self._stored(location), self.size)
        except UNREADABLE as error:
            raise ValueError(f"{location if isinstance(location, str) else location[-1]}: {error}") from error

    def batch(self, start: int, size: int, seed: int) -> PreferencePairs:
        winners, losers, captions = zip(*self.at(start, size, seed), strict=True)
        return PreferencePairs(torch.stack(winners), torch.stack(losers), captions)


class JsonPairs(PairTable):
    """Pairs of a .jsonl file: one object per line with "text", "winner" and "loser", paths relative to the file.

    Lines whose winner and loser are null prefer neither image; they are left out and counted in `notes`.
    """

    def _read_table(self) -> Iterator[Row]:
        lines, undecided = read_lines(self.source, KEY), 0
        for where, line in lines:
            try:
                record = json_object(line)
                if {"winner", "loser"} <= record.keys() and record["winner"] is record["loser"] is None:
                    undecided += 1
                    continue
                names = (text_column(record, "", KEY), "winner", "loser")
                text, winner, loser = (record[key] for key in names)
                if not all(isinstance(value, str) and value.strip() for value in (text, winner, loser)):
                    raise ValueError
                if too_long(text):
                    raise ConfigError(too_long(text))
            except (ValueError, KeyError, ConfigError) as error:
                expected = 'a JSON object with "text", "winner" and "loser" as non-empty strings'
                why = f" ({error})" if isinstance(error, ConfigError) else ""
                leave_out(self._skipped, KEY, f"{where}: expected {expected}, found {line[:60]!r}{why}")
                continue
            missing = [name for name in (winner, loser) if not (self.source.parent / name).is_file()]
            if missing:
                leave_out(self._skipped, KEY, f"{where}: there is no file {self.source.parent / missing[0]}")
            elif winner == loser:
                leave_out(self._skipped, KEY, f"{where}: winner and loser are the same file, {winner}")
            else:
                yield Row(where, text, winner, loser)
        self._note_undecided(undecided, len(lines))

    def _stored(self, location: Any) -> bytes:
        return (self.source.parent / str(location)).read_bytes()


class ParquetPairs(PairTable):
    """Pairs of parquet files with Pick-a-Pic's columns: caption, jpg_0, jpg_1 (file bytes), label_0 (1 or 0), label_1.

    The column label_1 is optional. Rows without a label or with a label of 0.5 prefer neither image; they are left out,
    as in Diffusion-DPO, and counted in `notes`. Images are read one row group at a time, so small row groups make
    random access fast.
    """

    def __init__(self, source: Path, size: int, skipped: list[str] | None = None) -> None:
        self._parquet = _parquet()
        self._group: tuple[tuple[Path, int], Any] | None = None
        super().__init__(source, size, skipped)

    def _read_table(self) -> Iterator[Row]:
        files = [self.source] if self.source.is_file() else sorted(self.source.glob("*.parquet"))
        count = undecided = 0
        for file in files:
            for number, (group, place, record) in enumerate(self._records(file)):
                count += 1
                where = f"{file}, row {number}"
                caption, first, second = (record.get(name) for name in ("caption", "label_0", "label_1"))
                # The label of an unlabelled row is missing or NaN.
                if record.get("has_label") is False or first is None or first != first or first == 0.5:
                    undecided += 1
                elif first not in (0, 1) or second not in (None, 1 - first):
                    found = f"label_0 is {first} and label_1 {second}"
                    leave_out(self._skipped, KEY, f"{where}: {found}, expected 1 and 0")
                elif isinstance(caption, str) and too_long(caption):
                    leave_out(self._skipped, KEY, f"{where}: {too_long(caption)}")
                elif not (isinstance(caption, str) and caption.strip()):
                    found = f"found {caption!r}"
                    leave_out(self._skipped, KEY, f"{where}: expected a non-empty string as caption, {found}")
                else:
                    names = ("jpg_0", "jpg_1") if first else ("jpg_1", "jpg_0")
                    yield Row(where, caption, *((file, group, place, name) for name in names))
        self._note_undecided(undecided, count)

    def _records(self, file: Path) -> Iterator[tuple[int, int, Mapping[str, Any]]]:
        """Yield the row group, the position in it and the values of each row, without the images."""
        with self._opened(file) as opened:
            names = set(opened.schema_arrow.names)
            if missing := {"caption", "jpg_0", "jpg_1", "label_0"} - names:
                raise ConfigError(
                    f"{KEY}: {file} has no column {', '.join(sorted(missing))}; expected caption, jpg_0, jpg_1 "
                    "and label_0, as in Pick-a-Pic"
                )
            columns = sorted(names & {"caption", "label_0", "label_1", "has_label"})
            for group in range(opened.num_row_groups):
                try:
                    table = opened.read_row_group(group, columns=columns)
                except (OSError, ValueError) as error:
                    raise ConfigError(f"{KEY}: {file} is damaged ({error})") from error
                for place, record in enumerate(table.to_pylist()):
                    yield group, place, record

    def _opened(self, file: Path) -> Any:
        try:
            return self._parquet.ParquetFile(file)
        except (OSError, ValueError) as error:  # pyarrow's errors derive from these
            raise ConfigError(f"{KEY}: {file} cannot be read as parquet ({error})") from error

    def _stored(self, location: Any) -> bytes:
        file, group, place, column = location
        if self._group is None or self._group[0] != (file, group):
            with self._opened(file) as opened:
                self._group = (file, group), opened.read_row_group(group, columns=["jpg_0", "jpg_1"])
        value = self._group[1].column(column)[place].as_py()
        # The datasets library stores an image as a dict of its bytes and its original path.
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise ValueError(f"found {type(data).__name__}, expected the bytes of an image file")
        return data


def open_pairs(source: str, size: int, skipped: list[str] | None = None) -> Preferences:
    """Open the preference pairs that `[data] pairs` names, at `size` pixels.

    A missing or unreadable item raises ConfigError, or is left out and noted in `skipped` if that list is given: a
    missing file is found here, an unreadable one when it is loaded.
    """
    path = Path(source)
    if path.is_file() and path.suffix == ".jsonl":
        return JsonPairs(path, size, skipped)
    if path.is_dir() and (path / TABLE).is_file():
        return JsonPairs(path / TABLE, size, skipped)
    if (path.is_file() and path.suffix == ".parquet") or (path.is_dir() and any(path.glob("*.parquet"))):
        return ParquetPairs(path, size, skipped)
    if path.exists():
        raise ConfigError(
            f"{KEY}: {source} contains no preference pairs; expected a folder with {TABLE} or .parquet files, or "
            "one such file"
        )
    return open_class(source, size, Preferences, KEY, EXPECTED)  # type: ignore[type-abstract]


def check_pairs(source: str, skipped: list[str] | None = None) -> None:
    """Raise ConfigError for broken rows or missing files, as `open_pairs` would. Reads no image."""
    if Path(source).exists() or ":" not in source:
        open_pairs(source, 1, skipped)
    else:
        find_class(source, Preferences, KEY, EXPECTED)  # type: ignore[type-abstract]


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            'data.pairs: reading .parquet needs pyarrow, which is not installed: pip install "alignkit[parquet]"'
        ) from error
    return pyarrow.parquet
