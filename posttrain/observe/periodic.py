"""A thread that does something again and again beside the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

LONGEST_PAUSE = 10.0
"""Seconds between two calls at most, whatever they cost."""


class Periodic:
    """Calls `do` every `seconds` in a thread of its own, from `start` to `stop`.

    Args:
        share: of a core, that it may take: when its calls cost more, there are fewer of them.
    """

    def __init__(self, name: str, seconds: float, do: Callable[[], None], share: float = 1.0) -> None:
        self._seconds = seconds
        self._share = share
        self._do = do
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Call it for the first time in `seconds`."""
        self._thread.start()

    def stop(self) -> None:
        """Call it no more; returns when no call is running."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        pause = self._seconds
        while not self._stop.wait(pause):
            began = time.thread_time()
            self._do()
            pause = max(self._seconds, min((time.thread_time() - began) / self._share, LONGEST_PAUSE))
