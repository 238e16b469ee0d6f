"""A thread for what is slow. The end of the process does not wait long for it, as it would for concurrent.futures."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Event, Thread

from alignkit.records import Scores

PATIENCE = 5.0
"""Seconds that the end of the process waits for an answer that nobody wants any more: torch does not like to be ended
in the middle of a computation."""


class Worker:
    """A thread that does one thing after another. The process does not wait for what it is at when it ends, but for
    some seconds."""

    def __init__(self, name: str) -> None:
        self.closed = Event()
        self._queue: SimpleQueue[tuple[Future[Scores], Callable[..., Scores], tuple[object, ...]] | None] = (
            SimpleQueue()
        )
        self._thread = Thread(target=self._work, name=name, daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def submit(self, do: Callable[..., Scores], *arguments: object) -> Future[Scores]:
        answer: Future[Scores] = Future()
        self._queue.put((answer, do, arguments))
        return answer

    def close(self) -> None:
        """Begin nothing more."""
        self.closed.set()
        try:
            while (waiting := self._queue.get_nowait()) is not None:
                waiting[0].cancel()
        except Empty:
            pass
        self._queue.put(None)

    def _end(self) -> None:
        self.close()
        self._thread.join(PATIENCE)

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            answer, do, arguments = task
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(do(*arguments))
                except BaseException as error:
                    answer.set_exception(error)
            del task, answer, do, arguments  # images among them, which nobody needs while it waits
        atexit.unregister(self._end)
