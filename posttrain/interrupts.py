"""Ctrl-C and SIGTERM: either ends the work in an orderly way, and neither disturbs the end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def raised_as_keyboard_interrupt(message: str = "") -> Iterator[None]:
    """In this block SIGINT and SIGTERM raise KeyboardInterrupt; `message` goes to standard error at once.

    A SIGINT that whoever started this process chose to ignore (`nohup`, a shell's background job) stays ignored.
    """

    def interrupt(*_: object) -> None:
        if message:
            os.write(2, f"\n{message}\n".encode())  # not print: the signal may have come in the middle of one
        raise KeyboardInterrupt

    caught = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, interrupt) for number in caught}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def ignored() -> Iterator[None]:
    """For the end of a run: nothing is started any more, and what is being stopped must be stopped completely."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, _nothing) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _nothing(*_: object) -> None:
    """A handler, and not SIG_IGN, which processes started now would inherit."""
