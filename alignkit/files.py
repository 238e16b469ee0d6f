"""Write files atomically."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alignkit.errors import AlignkitError


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
