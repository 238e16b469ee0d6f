"""Show two images of a prompt at a time on a page of this machine, and keep which of them a person prefers.

Images are generated ahead while the person answers. The page talks to the routes below in JSON; the images are in it,
so that neither their names nor their addresses show which is which.
"""

from __future__ import annotations

import base64
import random
import re
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit.errors import AlignkitError, ConfigError
from alignkit.files import write_file
from alignkit.page.template import open_template
from alignkit.records import Example
from alignkit.serving.answers import CHOICES, Answers, Pair, digest
from alignkit.serving.http import PROTOCOL, JsonServer, Refusal, Route

AHEAD = 8
"""Pairs to generate before they are shown."""
PATIENCE = 10.0
"""Seconds that a request waits for images before it is answered without them; the page then sends another."""
TEMPLATES = Path(__file__).parent / "templates"
SIDES = ("after", "before")
"""Names of the two images of a pair where a run is compared with its model before training."""

Generate = Callable[[Pair], tuple[bytes, bytes]]
"""A function that returns both images of a pair as PNG files, always the same ones."""


class Chooser(JsonServer):
    """A server of the page and of its answers, at 127.0.0.1 only."""

    def __init__(
        self,
        port: int,
        answers: Answers,
        examples: Sequence[Example],
        plan: Sequence[Pair],
        *,
        seed: int = 0,
        compares: bool = False,
        origin: Mapping[str, Any] | None = None,
        command: str = "",
    ) -> None:
        """Bind the port, or a free one if it is 0. Raises AlignkitError if that fails.

        `plan` are the pairs in the order in which they are shown, those in `answers` included. Which image stands left
        depends on `seed` and the pair. With `compares`, the two images are `SIDES` of a run. `origin` are further keys
        of every line, `command` is what the page suggests in the end.
        """
        if not 0 <= port <= 65535:
            raise ConfigError(f"--port {port}: expected 1 to 65535, or 0 for a free port")
        self.answers, self.examples, self.seed, self.origin = answers, examples, seed, dict(origin or {})
        self.compares, self.command = compares, command
        self.pending = deque(pair for pair in plan if pair not in answers.choices)
        self.session = digest([str(answers.folder.resolve()), answers.settings])
        """Identifies the images of the folder, so that a page left open answers no pair of another folder."""
        self.failure: BaseException | None = None
        """The exception that ended the generation of images, and with it `serve_forever`."""
        self._changed = threading.Condition()
        self._ended = False
        self._thread: threading.Thread | None = None
        page = open_template(TEMPLATES / "prefer.html", TEMPLATES / "prefer.js", {}).render(protocol=PROTOCOL)
        routes: dict[str, Route] = {
            "GET /": lambda _: page,
            "GET /state": self._wait,
            "POST /answer": self._answer,
            "POST /undo": self._undo,
        }
        try:
            super().__init__("127.0.0.1", port, routes, token="", max_bytes=10_000, max_requests=4)
        except OSError as error:
            raise AlignkitError(
                f"--port {port}: cannot be bound ({error.strerror}); choose another, or 0 for a free one"
            ) from error

    @property
    def done(self) -> int:
        """The number of answers."""
        return len(self.answers.choices)

    @property
    def total(self) -> int:
        """The number of pairs, answered or not."""
        return self.done + len(self.pending)

    def generate(self, generate: Generate) -> None:
        """Begin the folder, and start to generate images in a thread that ends with the server."""
        self.answers.begin()
        self._thread = threading.Thread(target=self._run, args=(generate,), daemon=True)
        self._thread.start()

    def server_close(self) -> None:
        """Close the port, and wait until the pair under way is generated."""
        super().server_close()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def left(self, pair: Pair) -> int:
        """Return which image of the pair, 0 or 1, stands left."""
        return random.Random(f"{self.seed}/{pair.name}").randrange(2)

    def summary(self) -> str:
        """Return the numbers of answers in words; of a comparison, how often which side was preferred."""
        text = self.answers.counts()
        if self.compares:
            found = [self._side(pair, choice) for pair, choice in self.answers.choices.items()]
            text += "; preferred: " + ", ".join(f"{name} training {found.count(name)}" for name in SIDES)
        return text

    def next_command(self) -> str:
        """Return the command that trains on the pairs; empty as long as no image is preferred."""
        return self.command if {"left", "right"} & set(self.answers.choices.values()) else ""

    def _side(self, pair: Pair, choice: str) -> str | None:
        place = {"left": self.left(pair), "right": 1 - self.left(pair)}.get(choice)
        return None if place is None else SIDES[place]

    # the thread that generates

    def _run(self, generate: Generate) -> None:
        try:
            while (pair := self._next()) is not None:
                for name, data in zip(pair.files, generate(pair), strict=True):
                    write_file(self.answers.folder / name, data)
                with self._changed:
                    self._changed.notify_all()
        except BaseException as error:  # raised in the main thread
            self.failure = error
            self.shutdown()

    def _next(self) -> Pair | None:
        """Wait for a pair that needs images, one that is shown soon; return None once the server has ended."""
        found: list[Pair] = []

        def missing() -> bool:
            found[:] = [pair for pair, _ in zip(self.pending, range(AHEAD), strict=False) if not self._ready(pair)][:1]
            return self._ended or bool(found)

        with self._changed:
            self._changed.wait_for(missing)
            return None if self._ended else found[0]

    def _ready(self, pair: Pair) -> bool:
        return all((self.answers.folder / name).is_file() for name in pair.files)

    # routes

    def _wait(self, body: dict[str, Any]) -> dict[str, Any]:
        """Respond to GET /state, once the next pair has its images."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or not self.pending or self._ready(self.pending[0]), PATIENCE)
            return self._state()

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """Respond to POST /answer {"pair", "answer"}. The same answer once more changes nothing."""
        pair, choice = self._pair(body), body.get("answer")
        if choice not in CHOICES:
            raise Refusal(400, f"found answer {str(choice)[:20]!r}, expected {', '.join(CHOICES)}")
        with self._changed:
            known = self.answers.choices.get(pair)
            if known is None:
                if not self.pending or pair != self.pending[0] or not self._ready(pair):
                    raise Refusal(409, f"pair {pair.name} is not the one shown now")
                self.answers.add(pair, choice, self.left(pair), self._record(pair, choice))
                self.pending.popleft()
                self._changed.notify_all()
            elif known != choice:
                raise Refusal(409, f"pair {pair.name} was answered before, with {known}")
            return self._state()

    def _undo(self, body: dict[str, Any]) -> dict[str, Any]:
        """Respond to POST /undo {"pair"}, which must be the one that was answered last."""
        pair = self._pair(body)
        with self._changed:
            if pair != self.answers.last:
                raise Refusal(409, f"pair {pair.name} is not the one answered last")
            self.pending.appendleft(self.answers.undo())
            self._changed.notify_all()
            return self._state()

    def _pair(self, body: dict[str, Any]) -> Pair:
        found = re.fullmatch(r"([0-9]{6,9})_([0-9]{1,9})", str(body.get("pair")))
        if found is None:
            raise Refusal(400, "expected pair, the name of a pair")
        if body.get("session") != self.session:
            raise Refusal(409, "the page showed images of another folder; look at these ones")
        return Pair(int(found[1]), int(found[2]))

    def _state(self) -> dict[str, Any]:
        last, shown = self.answers.last, self.pending[0] if self.pending else None
        state: dict[str, Any] = {
            "done": self.done, "total": self.total, "last": last and last.name, "pair": None,
            "session": self.session, "summary": self.summary() if shown is None else self.answers.counts(),
            "command": self.next_command(),
        }  # fmt: skip
        if shown is not None and self._ready(shown):
            sides = [shown.files[index] for index in (self.left(shown), 1 - self.left(shown))]
            left, right = (base64.b64encode((self.answers.folder / name).read_bytes()).decode() for name in sides)
            text = self.examples[shown.prompt].text
            state["pair"] = {"name": shown.name, "text": text, "left": left, "right": right}
        return state

    def _record(self, pair: Pair, choice: str) -> dict[str, Any]:
        example = self.examples[pair.prompt]
        more: dict[str, Any] = {"preferred": self._side(pair, choice)} if self.compares else {}
        more |= {"metadata": dict(example.metadata)} if example.metadata else {}
        return {"text": example.text, **self.origin, **more}
