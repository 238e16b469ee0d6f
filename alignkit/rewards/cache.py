"""Cache scores of black-box rewards on disk, so that no image is scored twice."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from alignkit.data.decode import to_uint8
from alignkit.errors import AlignkitError
from alignkit.records import Example, Scores


class ScoreCache:
    """An SQLite file of scores and their parts, keyed by a hash of pixels, text, metadata and the reward's fingerprint.

    Processes and threads may share it. Scores are returned bit for bit; only images that could be scored are stored.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._open: sqlite3.Connection | None = None

    def get(self, keys: Sequence[str], device: torch.device) -> Scores | None:
        """Return the scores for all of `keys`, or None if any is missing.

        All or none, because the last bits of a score may depend on the batch it is computed in: a batch with a missing
        entry is scored again as a whole.
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
        """Store the valid ones of `scores`, float32 for N images, under N keys."""
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
        """Close the file. It is reopened on the next access."""
        with self._lock:
            if self._open is not None:
                self._open.close()
                self._open = None

    def _run(self, statement: str, values: Sequence[str] = ()) -> list[tuple[str]]:
        try:
            found: list[tuple[str]] = self._connection().execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        return found

    def _connection(self) -> sqlite3.Connection:
        if self._open is None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # All threads share the connection; self._lock admits one at a time.
                connection = sqlite3.connect(self.path, timeout=30, check_same_thread=False)
                # Safe if the process is killed. A power failure may lose the file, which is acceptable for a cache.
                connection.execute("PRAGMA synchronous = OFF")
                connection.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score TEXT) WITHOUT ROWID")
            except (OSError, sqlite3.Error) as error:
                raise self._unusable(error) from error
            self._open = connection
        return self._open

    def _unusable(self, error: Exception) -> AlignkitError:
        return AlignkitError(
            f"{self.path}: cannot be used as a score cache ({error}); delete it or change scoring.cache"
        )


def keys_of(fingerprint: str, images: Tensor, examples: Sequence[Example]) -> list[str]:
    """Return a key of 32 hex digits for each image of (N, 3, H, W) in [0, 1], rounded to 8 bits, with its example."""
    levels = to_uint8(images).cpu().contiguous()
    keys = []
    for image, example in zip(levels, examples, strict=True):
        metadata = json.dumps(dict(example.metadata), sort_keys=True, default=str)
        # Prefixed with their lengths, so that different texts cannot concatenate to the same string.
        texts = [f"{len(text)} {text}" for text in (fingerprint, example.text, metadata)]
        digest = hashlib.blake2b("".join([*texts, str(tuple(image.shape))]).encode(errors="surrogatepass"))
        digest.update(image.numpy().data)
        keys.append(digest.hexdigest()[:32])
    return keys
