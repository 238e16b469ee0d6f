"""Read prompts from .txt, .jsonl and .parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignkit.data.prompt_sets import PROMPT_SETS, prompt_file
from alignkit.data.text import choose_column, json_object, leave_out, plain_columns, read_lines, text_column, too_long
from alignkit.errors import ConfigError
from alignkit.records import Example
from alignkit.registry import nearest


def read_examples(
    path: str | Path, column: str = "", skipped: list[str] | None = None, key: str = "prompts"
) -> list[Example]:
    """Read the prompts of a file: one per line (.txt), one JSON object per line (.jsonl) or one per row (.parquet).

    `path` may also be the name of a bundled set (`alignkit.data.prompt_sets`).

    `column` names the text. If it is empty, the text is "text" in .jsonl, otherwise (as in .parquet) the one of
    `COLUMNS` that exists. The other keys of an object are metadata, and so are the columns of a .parquet file that hold
    strings, numbers or booleans. A line or row without text raises ConfigError with its location, or is left out and
    noted in `skipped` if that list is given. Messages begin with `key`, the setting that names the file.
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
            if isinstance(text := row.pop(name), str) and text.strip() and too_long(text):
                leave_out(skipped, key, f"{where}: {too_long(text)}")
            elif isinstance(text, str) and text.strip():
                examples.append(Example(text, row, where))
            else:
                leave_out(skipped, key, f"{where}: expected a non-empty string as {name}, found {text!r}")
    else:
        for where, line in read_lines(path, key):
            if path.suffix != ".jsonl" and too_long(line):
                leave_out(skipped, key, f"{where}: {too_long(line)}")
                continue
            if path.suffix != ".jsonl":
                examples.append(Example(line.strip(), place=where))
                continue
            try:
                record = json_object(line)
                text = record.pop(text_column(record, column, "data.prompt_column"))
                if not (isinstance(text, str) and text.strip()):
                    raise ValueError(f"the text is {text!r}")
                if too_long(text):
                    raise ValueError(too_long(text))
                examples.append(Example(text, record, where))
            except (ValueError, ConfigError) as error:
                wanted = f'"{column}"' if column else '"prompt", "caption" or "text"'
                expected = f"expected a JSON object with {wanted} as a non-empty string, found {line[:60]!r}"
                leave_out(skipped, key, f"{where}: {expected} ({error})")
    if not examples:
        raise ConfigError(f"{key}: {path} contains no prompt; expected at least one line of text")
    return examples


def _read_parquet(path: Path, column: str, key: str) -> tuple[str, list[dict[str, Any]]]:
    """Return the name of the text column, and the rows: the text and every column that can be metadata."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ConfigError(f"{key}: {path}: reading .parquet needs pyarrow; pip install 'alignkit[parquet]'") from None
    try:
        file = parquet.ParquetFile(path)
        schema = file.schema_arrow
        name = choose_column(schema.names, column, "data.prompt_column", path)
        # Columns of images and lists, which are common in such files, are not read.
        return name, file.read(columns=list(dict.fromkeys([name, *plain_columns(schema)]))).to_pylist()
    except (OSError, ArrowException) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{key}: {path} cannot be read ({reason})") from error
