"""Read lines and JSON objects of text files, and choose the column that holds the text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit.errors import ConfigError

COLUMNS = ("prompt", "caption", "text")
"""What a column of texts is called where nobody says so."""


def leave_out(skipped: list[str] | None, key: str, what: str) -> None:
    """What happens to what is broken: a ConfigError under the name `key`, or, given a list, a line in it."""
    if skipped is None:
        # Held-out prompts, and those of a command, are never skipped.
        remedy = '; mend it, or set data.on_error = "skip"' if key.startswith("data.") else ""
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
