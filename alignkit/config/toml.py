"""Read and write run files as text: one value from the command line, the line of a key, the resolved file.

The standard library reads TOML and does not write it. What a run file holds (scalars, flat lists, tables) takes
fewer lines to write than another dependency takes to keep.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from alignkit.errors import ConfigError
from alignkit.files import parse_toml


def parse_assignment(text: str) -> tuple[str, Any]:
    """Parse `key.path=value`, the value in TOML syntax; other text that opens no bracket or quote is a string."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise ConfigError(f"--set {text}: expected key.path=value, for example train.updates=100")
    try:
        parsed = parse_toml(f"value = {value}")
    except ValueError as error:
        if value.startswith(("[", "{", '"', "'")):
            raise ConfigError(f"--set {key}: found {value}, expected a TOML value: {error}") from None
        return key, value
    known = parsed.keys() == {"value"} and isinstance(parsed["value"], bool | int | float | str | list | dict)
    return key, parsed["value"] if known else value  # a date, say, is a string here


def line_of(text: str, section: str, key: str, entry: int = 0) -> int | None:
    """Return the line of `key` in the `entry`-th table called `section`, else of its header; None without either."""
    current, seen, header = "", -1, None
    for number, line in enumerate(text.splitlines(), start=1):
        if match := re.match(r"\s*\[\[?\s*([\w.-]+)\s*\]", line):
            current = match[1]
            if current == section:
                seen += 1
                header = number if seen == entry else header
        elif current == section and seen in (entry, -1):
            if re.match(rf"""\s*["']?{re.escape(key)}["']?\s*[=.]""", line):
                return number
        elif not current and re.match(rf"\s*{re.escape(section)}\s*(=|\.\s*{re.escape(key)}\s*=)", line):
            return number
    return header


def format_value(value: Any) -> str:
    """Return a value in TOML syntax."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | PurePath):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{json.dumps(k)} = {format_value(v)}' for k, v in value.items())} }}"
    return str(value)  # in messages alone: nothing else gets through the type check


def format_file(tree: Mapping[str, Any]) -> str:
    """Return a run file: plain keys, then a [table] a section, then [[table]] for lists of tables; None is left out."""
    return "\n".join(_lines(tree, "")) + "\n"


def _lines(tree: Mapping[str, Any], section: str) -> list[str]:
    lines, tables = [], []
    for key, value in tree.items():
        if isinstance(value, Mapping) and not section:
            tables.append((key, f"[{key}]", value))
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            tables += [(key, f"[[{section}{key}]]", item) for item in value]
        elif value is not None:
            lines.append(f"{key} = {format_value(value)}")
    for key, header, table in tables:
        lines += ["", header, *_lines(table, f"{section}{key}.")]
    return lines
