"""Locate captioned images in folders, .jsonl tables and tar shards in WebDataset format.

Missing files and captions are found here; no image is opened.
"""

from __future__ import annotations

import glob
import itertools
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.data.text import choose_column, json_object, leave_out, read_lines, too_long
from alignkit.errors import ConfigError

KEY = "data.images"
CAPTION_KEY = "data.caption_column"
METADATA = "metadata.jsonl"
"""File name of the table in a folder of images, as in the imagefolder of the `datasets` library."""
GRID = "grid.png"
"""File name of the overview that `alignkit sample` adds to its images; no line of the table names it."""
MOST_SHARDS = 100_000
"""Most files that the braces of a pattern may stand for."""
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True, slots=True)
class StoredImage:
    """A caption, and the image's bytes: start .. start + length of a file, or the whole file if length is None."""

    name: str
    """File, line or archive member, for messages."""
    caption: str
    metadata: Mapping[str, Any]
    """The other keys of the image's record."""
    path: Path
    start: int = 0
    length: int | None = None


def read_folder(folder: Path, skipped: list[str] | None = None) -> Iterator[StoredImage]:
    """Yield every image in a folder and its subfolders, captioned by the .txt file of the same name, sorted by path."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in found if path.suffix.lower() in SUFFIXES]
    if not any(path.with_suffix(".txt").is_file() for path in files):
        raise ConfigError(
            f'{KEY}: {folder / METADATA} is missing; expected one JSON object per line with "file_name" and '
            '"text", or a .txt file of the same name next to each image'
        )
    for path in files:
        try:
            caption = path.with_suffix(".txt").read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            leave_out(skipped, KEY, f"{path}: its caption {path.stem}.txt cannot be read ({error})")
            continue
        if not caption:
            leave_out(skipped, KEY, f"{path}: its caption {path.stem}.txt is empty")
            continue
        yield StoredImage(str(path), caption, {}, path)
    imaged = {path.with_suffix("") for path in files}
    for path in found:
        if path.suffix == ".txt" and path.with_suffix("") not in imaged:
            leave_out(skipped, KEY, f"{path}: there is no image of this name; expected {', '.join(sorted(SUFFIXES))}")


def read_table(
    table: Path, column: str = "", skipped: list[str] | None = None, key: str = KEY
) -> Iterator[StoredImage]:
    """Yield the images of a .jsonl table: one JSON object per line with a caption and a path, "image" or "file_name".

    Paths are relative to the table's folder. Other keys are metadata. Messages begin with `key`.
    """
    for where, line in read_lines(table, key):
        try:
            record = json_object(line)
            path_key = "image" if "image" in record else "file_name"
            if not isinstance(name := record.get(path_key), str):
                raise ValueError(f'expected the image\'s path as "image" or "file_name", found {line[:60]!r}')
            caption, metadata = _captioned(record, column)
        except ValueError as error:
            leave_out(skipped, key, f"{where}: {error}")
            continue
        metadata.pop(path_key, None)
        if (table.parent / name).is_file():
            yield StoredImage(f"{where}: {name}", caption, metadata, table.parent / name)
        else:
            leave_out(skipped, key, f"{where}: there is no file {table.parent / name}")


def read_shard(shard: Path, column: str = "", skipped: list[str] | None = None) -> Iterator[StoredImage]:
    """Yield the images of a tar file in WebDataset format: members with one name up to the first dot are one sample.

    The caption is a .txt member, or a key of a .json member, whose other keys are metadata. Only headers and these
    members are read.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            fault = ""
            try:
                for member in tar:
                    folder, slash, name = member.name.rpartition("/")
                    key, _, suffix = name.partition(".")
                    members = samples.setdefault(folder + slash + key, {}) if member.isfile() else {}
                    if "." + suffix.lower() in members:
                        leave_out(skipped, KEY, f"{shard}, member {member.name}: a duplicate name")
                    elif member.isfile():
                        members["." + suffix.lower()] = member
                # tarfile stops silently at a header that it cannot read; a complete archive ends with a block of zeros.
                assert tar.fileobj is not None
                tar.fileobj.seek(tar.offset)
                end = tar.fileobj.read(tarfile.BLOCKSIZE)
                fault = "" if len(end) == tarfile.BLOCKSIZE and not any(end) else "its end is missing"
            except (tarfile.TarError, OSError) as error:
                fault = str(error)
            if fault:
                last = f"after member {next(reversed(samples))}" if samples else "from its start"
                leave_out(skipped, KEY, f"{shard}: cut short or damaged {last} ({fault})")
            for key, members in samples.items():
                try:
                    found = [suffix for suffix in members if suffix in SUFFIXES]
                    if len(found) != 1:
                        raise ValueError(f"expected one image, found {', '.join(members)}")
                    caption, metadata = _described(tar, members, column)
                except (ValueError, tarfile.TarError, OSError) as error:
                    leave_out(skipped, KEY, f"{shard}, member {key}: {error}")
                    continue
                image = members[found[0]]
                name = f"{shard}, member {image.name}"
                yield StoredImage(name, caption, metadata, shard, image.offset_data, image.size)
    except (tarfile.TarError, OSError) as error:
        leave_out(skipped, KEY, f"{shard} cannot be read as an uncompressed tar file ({error})")


def _described(tar: tarfile.TarFile, members: Mapping[str, tarfile.TarInfo], column: str) -> tuple[str, dict[str, Any]]:
    """Return the caption and the metadata of one sample. Raises ValueError if there is no caption."""

    def content(suffix: str) -> bytes:
        file = tar.extractfile(members[suffix])
        return b"" if file is None else file.read()

    record = json_object(content(".json")) if ".json" in members else None
    if ".txt" in members and not (column and record is not None):
        return _text(content(".txt").decode("utf-8-sig").strip()), record or {}
    if record is not None:
        return _captioned(record, column)
    raise ValueError(f"expected a caption as .txt or .json, found {', '.join(members)}")


def _captioned(record: Mapping[str, Any], column: str) -> tuple[str, dict[str, Any]]:
    """Return the caption in `record` and its other keys. Raises ValueError if it is missing, ambiguous or no string."""
    try:
        name = choose_column(list(record), column, CAPTION_KEY, "it")
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return _text(record[name]), {key: value for key, value in record.items() if key != name}


def _text(caption: Any) -> str:
    if not (isinstance(caption, str) and caption.strip()):
        raise ValueError(f"expected a non-empty string as the caption, found {repr(caption)[:60]}")
    if too_long(caption):
        raise ValueError(too_long(caption))
    return caption


def shards(pattern: str) -> list[Path]:
    """Expand `pattern`, which may contain `{0000..0012}`, `{a,b}`, `*`, `?` and `[...]`, to paths in order."""
    if Path(pattern).is_file():
        return [Path(pattern)]
    found = []
    names = list(itertools.islice(_braces(pattern), MOST_SHARDS + 1))
    if len(names) > MOST_SHARDS:
        raise ConfigError(
            f"{KEY}: {pattern[:60]} stands for more than {MOST_SHARDS:,} files; correct the numbers in its braces"
        )
    for name in names:
        found += sorted(glob.glob(name)) if re.search(r"[*?[]", name) else [name]
    return [Path(name) for name in found]


def _braces(pattern: str) -> Iterator[str]:
    match = re.search(r"\{(?:(\d{1,12})\.\.(\d{1,12})|([^{}]*))\}", pattern)
    if match is None:
        yield pattern
        return
    first, last, names = match.groups()
    if first is not None:
        numbers = range(int(first), int(last) + 1)
        parts: Iterable[str] = (f"{number:0{len(first)}d}" for number in numbers)
    else:
        parts = names.split(",")
    for part in parts:
        yield from _braces(pattern[: match.start()] + part + pattern[match.end() :])
