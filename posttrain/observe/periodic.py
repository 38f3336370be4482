"""A thread that does something again and again beside the run."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Periodic:
    """Calls `do` every `seconds` in a thread of its own, from `start` to `stop`."""

    def __init__(self, name: str, seconds: float, do: Callable[[], None]) -> None:
        self._seconds = seconds
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
        while not self._stop.wait(self._seconds):
            self._do()
