"""The same work for several names at once, in threads that only wait for actors; one slot each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import TypeVar

from posttrain.interrupts import ignored

Result = TypeVar("Result")

PATIENCE_SECONDS = 8.0
"""How long interrupted threads have to notice that their actors are gone."""


class Stopped(Exception):
    """The run is ending: nothing new is started."""


def side_by_side(
    names: Sequence[str],
    do: Callable[[str, int], Result],
    slots: int,
    ending: Event,
    interrupt: Callable[[], None],
) -> dict[str, Result]:
    """Call `do(name, slot)` for each name, as many at a time as there are slots, one name at a time in each slot.

    After an error `ending` is set and no further name is begun; what runs may come to the end of its stage, where
    it sees `ending` and raises `Stopped`. Then the first error is raised.

    Args:
        interrupt: called on Ctrl-C, after `ending` was set; has to make the running calls of `do` return soon.
    """
    waiting: SimpleQueue[str] = SimpleQueue()
    for name in names:
        waiting.put(name)
    results: dict[str, Result] = {}
    errors: list[BaseException] = []
    ended: SimpleQueue[int] = SimpleQueue()

    def serve(slot: int) -> None:
        try:
            while not ending.is_set() and (name := _next(waiting)) is not None:
                results[name] = do(name, slot)
        except Stopped:
            pass
        except BaseException as error:
            errors.append(error)
            ending.set()
        finally:
            ended.put(slot)

    # Daemons, and no executor: a thread that hangs must not keep the process from ending.
    threads = [Thread(target=serve, args=(slot,), name=f"slot-{slot}", daemon=True) for slot in range(slots)]
    for thread in threads:
        thread.start()
    try:
        for _ in threads:
            ended.get()  # not `join`, which Python 3.11 does not survive being interrupted in
    except BaseException:
        with ignored():
            ending.set()
            interrupt()
            deadline = time.monotonic() + PATIENCE_SECONDS
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
        raise
    if errors:
        raise errors[0]
    if len(results) < len(names):  # somebody else ends the run
        raise Stopped
    return {name: results[name] for name in names}


def _next(waiting: SimpleQueue[str]) -> str | None:
    try:
        return waiting.get_nowait()
    except Empty:
        return None
