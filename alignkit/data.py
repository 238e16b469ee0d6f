"""Prompts, and streams over them and over captioned pictures, whose position is a single number."""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.interfaces import Example
from alignkit.prompt_sets import PROMPT_SETS, prompt_file
from alignkit.registry import nearest

T = TypeVar("T")

COLUMNS = ("prompt", "caption", "text")
"""What a column of texts is called where nobody says so."""


def leave_out(skipped: list[str] | None, key: str, what: str) -> None:
    """What happens to what is broken: a ConfigError under the name `key`, or, given a list, a line in it."""
    if skipped is None:
        # Held-out prompts, and those of a command, are never skipped.
        remedy = '; mend it, or set data.broken = "skip"' if key.startswith("data.") else ""
        raise ConfigError(f"{key}: {what}{remedy}")
    skipped.append(what)


def choose_column(names: Sequence[str], wanted: str, key: str, where: object) -> str:
    """The column `wanted`, or if that is empty the one of `COLUMNS` that is there.

    Raises ConfigError under the name of the option, `key`, where there is none or more than one.
    """
    found = [name for name in ([wanted] if wanted else COLUMNS) if name in names]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"{key}: {where} has {' and '.join(found)}; say which of them holds the text")
    expected = wanted or "prompt, caption or text"
    raise ConfigError(f"{key}: {where} has no {expected}; what is there: {', '.join(names)}")


def text_column(record: Mapping[str, Any], wanted: str, key: str) -> str:
    """The key of the text in an object of a .jsonl file: `wanted`, or "text", or what `choose_column` finds."""
    return choose_column(list(record), wanted or ("text" if "text" in record else ""), key, "it")


def read_lines(path: Path, key: str) -> list[tuple[str, str]]:
    """The lines of a text file that are not empty, each behind its place ("p.txt, line 3")."""
    try:
        # Not splitlines, which also ends lines at characters that JSON strings may hold.
        data = path.read_bytes()
        lines = data.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"found the byte 0x{data[error.start]:02x}"
        raise ConfigError(f"{key}: {path}, line {line}: {found}, expected UTF-8 text; save it as UTF-8") from error
    return [(f"{path}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()]


def json_object(text: str | bytes) -> dict[str, Any]:
    """Raises ValueError for anything else than a JSON object."""
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:  # without its own line, which is not that of the file
        raise ValueError(f"no JSON: {error.msg} at character {error.pos + 1}") from error
    if not isinstance(record, dict):
        raise ValueError(f"no JSON object, found {record!r}")
    return record


def read_examples(
    path: str | Path, column: str = "", skipped: list[str] | None = None, key: str = "prompts"
) -> list[Example]:
    """The prompts of a file: one a line (.txt), one JSON object a line (.jsonl), or one a row (.parquet).

    `path` may also be the name of a set that comes along (`alignkit.prompt_sets`).

    `column` names the text; empty: "text" in .jsonl, or else, as in .parquet, the one of `COLUMNS` that is there. What
    else an object holds is metadata, and so are the columns of a .parquet file that hold strings, numbers or booleans.
    A line or row without a text is refused with its place, or left out and noted in `skipped` if that is given.
    Messages begin with `key`, which is where the file was named.
    """
    path = prompt_file(path)
    if not path.suffix and not path.exists():
        hint = nearest(path.name, PROMPT_SETS)
        raise ConfigError(f"{key}: there is no file {path}, and no prompt set {path.name}{hint}")
    if path.suffix in (".csv", ".tsv", ".json"):
        raise ConfigError(f"{key}: {path} is a {path.suffix} file, expected .txt, .jsonl or .parquet")
    examples = []
    if path.suffix == ".parquet":
        name, rows = _read_parquet(path, column, key)
        for number, row in enumerate(rows):
            where = f"{path}, row {number}"
            if isinstance(text := row.pop(name), str) and text.strip():
                examples.append(Example(text, row, where))
            else:
                leave_out(skipped, key, f"{where}: expected a string that is not empty as {name}, found {text!r}")
    else:
        for where, line in read_lines(path, key):
            if path.suffix != ".jsonl":
                examples.append(Example(line.strip(), place=where))
                continue
            try:
                record = json_object(line)
                text = record.pop(text_column(record, column, "data.prompt_column"))
                if not (isinstance(text, str) and text.strip()):
                    raise ValueError(f"the text is {text!r}")
                examples.append(Example(text, record, where))
            except (ValueError, ConfigError) as error:
                wanted = f'"{column}"' if column else '"prompt", "caption" or "text"'
                expected = f"expected a JSON object with {wanted}, a string that is not empty, found {line[:60]!r}"
                leave_out(skipped, key, f"{where}: {expected} ({error})")
    if not examples:
        raise ConfigError(f"{key}: {path} holds no prompt; expected at least one line of text")
    return examples


def _read_parquet(path: Path, column: str, key: str) -> tuple[str, list[dict[str, Any]]]:
    """The name of the text column, and the rows with what can be metadata."""
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError:
        raise ConfigError(f"{key}: {path}: .parquet is read by pyarrow; pip install 'alignkit[parquet]'") from None
    try:
        file = parquet.ParquetFile(path)
        schema = file.schema_arrow
        name = choose_column(schema.names, column, "data.prompt_column", path)
        # Pictures and lists, which such files often hold as well, are not read at all.
        plain = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
        kept = [field.name for field in schema if any(is_kind(field.type) for is_kind in plain)]
        return name, file.read(columns=list(dict.fromkeys([name, *kept]))).to_pylist()
    except (OSError, ArrowException) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{key}: {path} cannot be read ({reason})") from error


class Stream:
    """Endless shuffled passes over a number of items. Item `i` of the stream depends on the seed and `i` alone."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def indices(self, start: int, size: int) -> list[int]:
        """Which items stand at positions start .. start + size."""
        order: dict[int, np.ndarray] = {}
        found = []
        for position in range(start, start + size):
            epoch, place = divmod(position, self.count)
            if epoch not in order:
                order[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            found.append(int(order[epoch][place]))
        return found


class Pictures(ABC):
    """Captioned pictures. `[data] pictures` names a place of files, or a subclass as "package.module:Class"."""

    @abstractmethod
    def batch(self, start: int, size: int, seed: int) -> tuple[Tensor, list[str]]:
        """Pictures (size, 3, H, W) float32 in [0, 1] and captions at positions start .. of the stream of `seed`."""


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
    """What that class gives for pictures of `size` pixels. Raises ConfigError for a size that it refuses as well."""
    try:
        found = find_class(source, base, key, expected)(size)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{key}: {source} does not open ({error})") from error
    if not isinstance(found, base):
        raise ConfigError(f"{key}: {source} gives no {base.__module__}.{base.__qualname__}")
    return found


def slice_of(position: int, size: int, rank: int, processes: int) -> tuple[int, int]:
    """Where process `rank` reads when each of `processes` takes `size` items a batch: (start, size)."""
    return (position * processes + rank) * size, size


def examples_at(examples: Sequence[Example], stream: Stream, start: int, size: int) -> list[Example]:
    """The examples at positions start .. start + size of a stream over them."""
    return [examples[i] for i in stream.indices(start, size)]
