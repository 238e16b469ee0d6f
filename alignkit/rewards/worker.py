"""A worker thread for slow rewards.

Unlike concurrent.futures, it delays the end of the process by at most `PATIENCE` seconds.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Event, Thread

from alignkit.records import Scores

PATIENCE = 5.0
"""Seconds that the end of the process waits for a running call, because ending torch during a computation may crash."""


class Worker:
    """A thread that runs one call after another. At exit, the process waits only briefly for the running call."""

    def __init__(self, name: str) -> None:
        self.closed = Event()
        self._queue: SimpleQueue[tuple[Future[Scores], Callable[..., Scores], tuple[object, ...]] | None] = (
            SimpleQueue()
        )
        self._thread = Thread(target=self._work, name=name, daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def submit(self, do: Callable[..., Scores], *arguments: object) -> Future[Scores]:
        """Queue the call `do(*arguments)` and return its future."""
        scores: Future[Scores] = Future()
        self._queue.put((scores, do, arguments))
        return scores

    def close(self) -> None:
        """Cancel the calls in the queue, and end the thread after the running one."""
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
            scores, do, arguments = task
            if scores.set_running_or_notify_cancel():
                try:
                    scores.set_result(do(*arguments))
                except BaseException as error:
                    scores.set_exception(error)
            del task, scores, do, arguments  # free the images while the thread waits
        atexit.unregister(self._end)
