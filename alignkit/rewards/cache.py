"""Scores of black boxes, kept on disk so that no image is judged twice."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from alignkit.errors import AlignkitError
from alignkit.records import Example, Scores


class ScoreCache:
    """One file of SQLite: a score and its parts by a hash of pixels, text, metadata and the reward's fingerprint.

    Processes and threads may share it. An entry is found again to the bit; only images that could be scored are kept.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._open: sqlite3.Connection | None = None

    def get(self, keys: Sequence[str], device: torch.device) -> Scores | None:
        """The scores under all of `keys`, or None if one is missing.

        All or none: a reward's last bits may depend on which images it is given together, so a part that is asked for
        again is asked for as a whole.
        """
        rows = []
        with self._lock:
            for key in keys:
                found = self._run("SELECT score FROM scores WHERE key = ?", (key,))
                if not found:
                    return None
                rows.append(json.loads(found[0][0]))
        names = dict.fromkeys(name for row in rows for name in row["parts"])
        nan = float("nan")
        parts = {name: torch.tensor([row["parts"].get(name, nan) for row in rows], device=device) for name in names}
        values = torch.tensor([row["value"] for row in rows], device=device)
        return Scores(values, torch.ones(len(rows), dtype=torch.bool, device=device), parts)

    def put(self, keys: Sequence[str], scores: Scores) -> None:
        """Keep what is valid of `scores`, float32 of N images, under N keys."""
        parts = {name: values.tolist() for name, values in scores.parts.items()}
        entries = []
        for i, (key, value, valid) in enumerate(zip(keys, scores.values.tolist(), scores.valid.tolist(), strict=True)):
            if valid:
                entry = {"value": value, "parts": {name: column[i] for name, column in parts.items()}}
                entries.append((key, json.dumps(entry)))
        with self._lock:
            for entry_row in entries:
                self._run("INSERT OR IGNORE INTO scores VALUES (?, ?)", entry_row)
            self._run("COMMIT") if self._connection().in_transaction else None

    def __len__(self) -> int:
        with self._lock:
            return int(self._run("SELECT COUNT(*) FROM scores")[0][0])

    def close(self) -> None:
        """Close the file; it is opened again when it is needed."""
        with self._lock:
            if self._open is not None:
                self._open.close()
                self._open = None

    def _run(self, statement: str, values: Sequence[str] = ()) -> list[tuple[str]]:
        try:
            found: list[tuple[str]] = self._connection().execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise AlignkitError(
                f"{self.path}: cannot be used as a cache of scores ({error}); delete it, or set scoring.cache"
            ) from error
        return found

    def _connection(self) -> sqlite3.Connection:
        if self._open is None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # Of all threads: the lock above lets one in at a time.
                connection = sqlite3.connect(self.path, timeout=30, check_same_thread=False)
                # A killed process loses nothing so; a machine that loses its power may lose the file, which is a cache.
                connection.execute("PRAGMA synchronous = OFF")
                connection.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score TEXT) WITHOUT ROWID")
            except (OSError, sqlite3.Error) as error:
                raise AlignkitError(
                    f"{self.path}: cannot be used as a cache of scores ({error}); delete it, or set scoring.cache"
                ) from error
            self._open = connection
        return self._open


def keys_of(fingerprint: str, images: Tensor, examples: Sequence[Example]) -> list[str]:
    """32 digits for each of N images (N, 3, H, W) in [0, 1] as 8-bit files hold them, with its example."""
    levels = (images.detach() * 255).round().byte().cpu().contiguous()
    keys = []
    for image, example in zip(levels, examples, strict=True):
        metadata = json.dumps(dict(example.metadata), sort_keys=True, default=str)
        # Each with its length, so that no two of them can run into each other.
        texts = [f"{len(text)} {text}" for text in (fingerprint, example.text, metadata)]
        digest = hashlib.blake2b("".join([*texts, str(tuple(image.shape))]).encode(errors="surrogatepass"))
        digest.update(image.numpy().data)
        keys.append(digest.hexdigest()[:32])
    return keys
