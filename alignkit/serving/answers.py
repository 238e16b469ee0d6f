"""The folder of a person's preferences: the settings of the images, and a line of pairs.jsonl for every answer."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.data.preferences import IMAGES, TABLE
from alignkit.data.text import json_object
from alignkit.errors import AlignkitError, ConfigError
from alignkit.files import write_file

SETTINGS = "prefer.json"
"""File name of the settings that the images of a folder were made with."""
CHOICES = ("left", "right", "tie", "skip")


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt."""

    prompt: int
    """Place of the prompt in its file."""
    copy: int
    """Number of the pair among those of its prompt."""

    @property
    def name(self) -> str:
        return f"{self.prompt:06d}_{self.copy}"

    @property
    def files(self) -> tuple[str, str]:
        """The paths of both images, relative to the folder."""
        return f"{IMAGES}/{self.name}_0.png", f"{IMAGES}/{self.name}_1.png"


class Answers:
    """The answers in a folder, which may stem from earlier processes.

    Every answer is one line, appended and synced, so that a killed process or a full disk loses none that was
    confirmed. Ties and skipped pairs have null as winner and loser: `[data] pairs` leaves them out.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], prompts: int) -> None:
        """Read the answers in `folder`, which may be new or empty, about the first `prompts` prompts.

        Raises ConfigError if it holds something else, or pairs made with other settings. Writes nothing, but for an
        unconfirmed piece of a last line, which is removed.
        """
        self.folder, self.table, self.settings = folder, folder / TABLE, dict(settings)
        self.choices: dict[Pair, str] = {}
        """The answer to each pair, the last one last."""
        self._starts: list[int] = []
        self._end = 0
        try:
            self._compare()
            self._read(prompts)
        except OSError as error:
            raise ConfigError(f"--out {folder}: cannot be read ({error.strerror or error})") from error

    def begin(self) -> None:
        """Write the settings into the folder, unless they are there."""
        if not (self.folder / SETTINGS).exists():
            write_file(self.folder / SETTINGS, json.dumps(self.settings, indent=1, ensure_ascii=False) + "\n")

    @property
    def last(self) -> Pair | None:
        """The pair that was answered last."""
        return next(reversed(self.choices), None)

    def counts(self) -> str:
        """Return the numbers of answers in words: "12 pairs, 3 ties, 1 skipped"."""
        found = Counter(self.choices.values())
        pairs, ties, skipped = found["left"] + found["right"], found["tie"], found["skip"]
        more = [f"{ties} tie{'s' * (ties != 1)}"] * bool(ties) + [f"{skipped} skipped"] * bool(skipped)
        return ", ".join([f"{pairs} pair{'s' * (pairs != 1)}", *more])

    def add(self, pair: Pair, choice: str, left: int, record: Mapping[str, Any]) -> None:
        """Append an answer; `left` (0 or 1) is the image that stood left, `record` holds the text and further keys.

        Raises AlignkitError if it cannot be written; the file is then as before.
        """
        images = pair.files[left], pair.files[1 - left]
        winner, loser = {"left": images, "right": images[::-1]}.get(choice, (None, None))
        line = {
            **record, "winner": winner, "loser": loser, "answer": choice, "left": images[0], "right": images[1],
            "prompt": pair.prompt, "copy": pair.copy,
        }  # fmt: skip
        data = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        self._unchanged()
        try:
            self._append(data)
        except OSError as error:
            self._cut(self._end)
            raise AlignkitError(
                f"{self.table}: the answer could not be written ({error.strerror}); try again"
            ) from error
        self._note(pair, choice, len(data))

    def undo(self) -> Pair:
        """Remove the last answer and return its pair. Raises AlignkitError if there is none."""
        if (pair := self.last) is None:
            raise AlignkitError(f"{self.table}: there is no answer to undo")
        self._unchanged()
        self._cut(self._starts.pop())
        del self.choices[pair]
        return pair

    def _note(self, pair: Pair, choice: str, length: int) -> None:
        self.choices[pair] = choice
        self._starts.append(self._end)
        self._end += length

    def _unchanged(self) -> None:
        """Raise AlignkitError if something else wrote to the table, such as a second process on the same folder."""
        size = self.table.stat().st_size if self.table.exists() else 0
        if size != self._end:
            raise AlignkitError(f"{self.table}: was changed by another program; end alignkit prefer and start it again")

    def _append(self, data: bytes) -> None:
        with self.table.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def _cut(self, end: int) -> None:
        try:
            with self.table.open("r+b") as file:
                file.truncate(end)
                os.fsync(file.fileno())
        except OSError as error:
            raise AlignkitError(f"{self.table}: cannot be written ({error.strerror})") from error
        self._end = end

    def _compare(self) -> None:
        """Raise ConfigError if the folder holds something else, or images that were made with other settings."""
        path = self.folder / SETTINGS
        if not path.exists():
            # Hidden files are what write_file leaves when its process is killed.
            if self.folder.exists() and (not self.folder.is_dir() or set(self.folder.glob("[!.]*"))):
                raise ConfigError(f"--out {self.folder}: exists already, without {SETTINGS}; choose another folder")
            return
        try:
            kept = json_object(path.read_bytes())
        except ValueError as error:
            raise ConfigError(f"--out {self.folder}: {SETTINGS} is damaged ({error}); choose another folder") from error
        for key, value in self.settings.items():
            if kept.get(key) != value:
                raise ConfigError(
                    f"--out {self.folder}: its images were made with {key} = {kept.get(key)}, found {value}; use the "
                    "same settings, or another folder"
                )

    def _read(self, prompts: int) -> None:
        data = self.table.read_bytes() if self.table.exists() else b""
        lines = data.split(b"\n")
        if rest := lines.pop():
            try:
                json_object(rest)
            except ValueError:  # the process or the machine ended in the middle of the line
                self._cut(len(data) - len(rest))
            else:
                self._append(b"\n")
                lines.append(rest)
        for number, line in enumerate(lines, start=1):
            try:
                record = json_object(line)
                pair, choice = Pair(record["prompt"], record["copy"]), record["answer"]
                if choice not in CHOICES or pair in self.choices or pair.prompt not in range(prompts):
                    raise ValueError
            except (ValueError, KeyError, TypeError) as error:
                found = line[:60].decode(errors="replace")
                raise ConfigError(
                    f"--out {self.folder}: {TABLE}, line {number}: found {found!r}, expected a line of alignkit prefer "
                    'with "prompt", "copy" and "answer", one for each pair; fix or remove it'
                ) from error
            self._note(pair, choice, len(line) + 1)


def digest(value: Any) -> str:
    """Return a short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]
