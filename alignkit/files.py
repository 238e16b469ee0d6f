"""Write files atomically; read text, JSON and TOML that strangers may have written."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import tomllib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignkit.errors import AlignkitError

MOST_BYTES = 1 << 30
"""Largest file that is read into memory as a whole."""
MOST_DEPTH = 64
"""Most levels of lists and objects in JSON and TOML. Deeper values would exceed Python's stack where they are used."""
MOST_DIGITS = 40
"""Most digits of an integer in JSON: enough for the 128 bits of a random generator, and still a finite float."""

_TOO_DEEP = f"found more than {MOST_DEPTH} levels of lists and tables, expected fewer"
_HALF = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
_LONG_KEY = re.compile(rf"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){{{MOST_DEPTH},}}""")
_SURROGATE = re.compile("[\ud800-\udfff]")


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, sync it and rename it, so that a reader sees the old content or the new.

    Creates the folder if necessary. Several processes may write the same file. Raises AlignkitError if the write fails;
    the old content is then unchanged.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    except OSError as error:
        if path.parent.is_dir():
            partial.unlink(missing_ok=True)
        raise AlignkitError(f"{path}: could not be written ({error.strerror}); its old content is unchanged") from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise AlignkitError in the place of an OSError, for a command whose --out is `folder`."""
    try:
        yield
    except OSError as error:
        raise AlignkitError(f"--out {folder}: cannot be written ({error.strerror or error})") from error


def share(folder: Path) -> None:
    """Give all files in a folder the permissions of new files; safetensors makes its own for their owner alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bytes(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """Return the content of a file of `most` bytes or fewer.

    Raises OSError for one that is larger or a device, which may have no end, and for a name that no file can have.
    """
    try:
        with open(path, "rb") as file:
            kind = os.fstat(file.fileno()).st_mode
            if stat.S_ISCHR(kind) or stat.S_ISBLK(kind):
                raise OSError(errno.EINVAL, "it is a device, no file", str(path))
            content = file.read(most + 1)
    except ValueError:  # open() raises no OSError for this
        raise OSError(errno.EINVAL, "its name contains a NUL character", str(path)) from None
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most} bytes", str(path))
    return content


def read_text(path: str | Path, most: int = MOST_BYTES) -> str:
    """Return the text of a UTF-8 file, without a byte order mark and with newlines as they are.

    Raises OSError as `read_bytes` does, and UnicodeDecodeError.
    """
    return read_bytes(path, most).decode("utf-8-sig")


def parse_json(text: str | bytes | bytearray, halves: bool = False) -> Any:
    """Parse JSON that a stranger may have written.

    Raises ValueError, in one line, for what is not JSON or not UTF-8, for more than `MOST_DEPTH` levels of lists and
    objects, for integers of more than `MOST_DIGITS` digits and, unless `halves` are allowed, for halves of surrogate
    pairs, which no tokenizer reads and no file stores.
    """
    if not isinstance(text, str):
        text = text.decode("utf-8-sig")
    try:
        value = json.loads(text, parse_int=_integer)
    except json.JSONDecodeError as error:  # without error.lineno, which is not the line of the file
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from error
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    # Looking at every value takes longer than parsing, and nearly no text needs it.
    if text.count("[") + text.count("{") > MOST_DEPTH or (not halves and _HALF.search(text)):
        _check_values(value, halves=halves)
    return value


def read_json(path: str | Path, halves: bool = False) -> Any:
    """Parse a JSON file. Raises OSError as `read_bytes` does, and ValueError as `parse_json` does."""
    return parse_json(read_bytes(path), halves)


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML that a stranger may have written.

    Raises ValueError, in one line, for what is not TOML, for more than `MOST_DEPTH` levels, and for integers of more
    than 64 bits, which TOML does not have.
    """
    if _LONG_KEY.search(text):  # the parser's time grows with the square of the length
        raise ValueError(_TOO_DEEP)
    try:
        tree = tomllib.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:  # Python's limit of digits
        raise ValueError("found an integer of more than 64 bits, expected a smaller one") from None
    _check_values(tree, bits=63)
    return tree


def path_fault(path: str | Path) -> str:
    """Return why no file can have this path: a name that is too long or contains NUL, a loop of links; else ""."""
    if "\0" in str(path):
        return "a path contains no NUL character"
    if long := next((part for part in Path(path).parts if len(os.fsencode(part)) > 255), ""):
        return f"a name in a path has 255 bytes at most, and {long[:20]}... has {len(os.fsencode(long))}"
    try:
        os.stat(path)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            return (error.strerror or "").lower()
    return ""


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"found an integer of {len(digits)} digits, expected {MOST_DIGITS} or fewer")
    return int(digits)


def _check_values(value: Any, bits: int = 4 * MOST_DIGITS, halves: bool = False) -> None:
    """Raise ValueError for a value that is nested too deep or holds what `parse_json` and `parse_toml` refuse."""
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += one
                inner += one.values()
            elif isinstance(one, list):
                inner += one
            elif isinstance(one, str) and not halves and _SURROGATE.search(one):
                raise ValueError("found half of a surrogate pair (\\ud800 to \\udfff), expected a whole character")
            elif isinstance(one, int) and one.bit_length() > bits:
                raise ValueError(f"found an integer of {one.bit_length()} bits, expected {bits} or fewer")
        if not inner:
            return
        level = inner
    raise ValueError(_TOO_DEEP)
