"""Read lines and JSON objects of text files, and choose the column that holds the text."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit.errors import ConfigError
from alignkit.files import parse_json, read_bytes

COLUMNS = ("prompt", "caption", "text")
"""Default names of the column that holds the text."""


MOST_CHARACTERS = 10_000
"""Longest text of a prompt or caption. Text encoders read a hundredth of it, and rewards take apart every word."""


def too_long(text: str) -> str:
    """Return why a text cannot be a prompt or caption if it is longer than `MOST_CHARACTERS`, else ""."""
    if len(text) <= MOST_CHARACTERS:
        return ""
    return f"the text has {len(text):,} characters, expected {MOST_CHARACTERS:,} or fewer"


def leave_out(skipped: list[str] | None, key: str, what: str) -> None:
    """Note a broken item in `skipped`, or raise a ConfigError that begins with `key` if there is no such list."""
    if skipped is None:
        # Held-out prompts and the prompts of a command are never skipped.
        remedy = '; fix it, or set data.on_error = "skip"' if key.startswith("data.") else ""
        raise ConfigError(f"{key}: {what}{remedy}")
    skipped.append(what)


def choose_column(names: Sequence[str], wanted: str, key: str, where: object) -> str:
    """Return the column `wanted`, or if that is empty the one of `COLUMNS` that exists.

    Raises ConfigError, beginning with the option `key`, if there is no such column or more than one.
    """
    found = [name for name in ([wanted] if wanted else COLUMNS) if name in names]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"{key}: {where} has {' and '.join(found)}; name the one that holds the text")
    expected = wanted or "prompt, caption or text"
    raise ConfigError(f"{key}: {where} has no {expected}; found: {', '.join(names)}")


def text_column(record: Mapping[str, Any], wanted: str, key: str) -> str:
    """Return the key of the text in a .jsonl object: `wanted`, else "text", else the result of `choose_column`."""
    return choose_column(list(record), wanted or ("text" if "text" in record else ""), key, "it")


def plain_columns(schema: Any) -> list[str]:
    """Return the names of the columns of a pyarrow schema that hold strings, numbers or booleans."""
    from pyarrow import types

    plain = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return [field.name for field in schema if any(is_kind(field.type) for is_kind in plain)]


def read_lines(path: Path, key: str) -> list[tuple[str, str]]:
    """Read the non-empty lines of a text file as (location, line), for example ("p.txt, line 3", "a red car")."""
    try:
        # Not splitlines(), which also splits at characters that JSON strings may contain.
        data = read_bytes(path)
        lines = data.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"found the byte 0x{data[error.start]:02x}"
        raise ConfigError(f"{key}: {path}, line {line}: {found}, expected UTF-8 text; save it as UTF-8") from error
    return [(f"{path}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()]


def json_object(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises ValueError for anything else."""
    record = parse_json(text)
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object: found {str(record)[:60]}")
    # The rows of a table share their few names, which would else be in memory once a row.
    return {sys.intern(name): value for name, value in record.items()}
