"""The fleet's tasks without processes: what a cancellation meets."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from rollouts.fleet import Fleet, Prepared, Slot
from rollouts.worker import Report


class Worker:
    """A handle whose polls are answered by hand."""

    def __init__(self) -> None:
        self.poll, self.polls = self, []

    def remote(self, seconds: float) -> asyncio.Future[Report]:
        self.polls.append(asyncio.get_running_loop().create_future())
        return self.polls[-1]


class Owner:
    def worker_report(self, index: int, report: Report) -> None: ...


def test_a_place_is_given_up_although_its_worker_answers_at_that_moment() -> None:
    async def give_up() -> None:
        fleet: Any = object.__new__(Fleet)
        fleet._stuck_seconds, fleet._owner = 60.0, Owner()
        worker = Worker()
        slot = Slot(0, Prepared(worker, 1, "here"))  # type: ignore[arg-type]
        serving = asyncio.create_task(fleet._serve(slot))
        while not worker.polls:
            await asyncio.sleep(0)
        worker.polls[-1].set_result(Report([], {}, 1, 1, 0.0, 1, None, 0.0))
        serving.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.wait_for(serving, 5)
        assert serving.cancelled()

    asyncio.run(give_up())
