"""The scheduler alone: no processes, no clocks."""

from __future__ import annotations

import copy
import random
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollouts.scheduler import Ended, Limits, Progress, Scheduler
from rollouts.types import GroupRequest, NewTokens, SampleRequest, Sampling

ALL = (0, 1)


def group(name: str, n: int = 1, max_tokens: int = 10, **fields: object) -> GroupRequest:
    return GroupRequest(name, [1, 2, 3], Sampling(max_tokens, n=n), **fields)  # type: ignore[arg-type]


def tokens(request: SampleRequest, count: int, reason: str | None = "stop") -> list[NewTokens]:
    """What a worker samples of a request from where it was: the numbers of the positions."""
    begin = len(request.token_ids)
    return [
        NewTokens(request.id, at, [at], [-1.0], 1, reason if at == begin + count - 1 else None)
        for at in range(begin, begin + count)
    ]


class Service:
    """A scheduler with workers that do as the test says."""

    def __init__(self, workers: int, **limits: object) -> None:
        self.scheduler = Scheduler(Limits(**{"running": 4, **limits}))  # type: ignore[arg-type]
        self.given: dict[int, dict[str, SampleRequest]] = defaultdict(dict)
        for worker in range(workers):
            self.scheduler.worker_up(worker)

    def submit(self, *groups: GroupRequest, known: dict[str, Progress] | None = None, **fields: object) -> None:
        order = self.scheduler.next_order()
        for row, one in enumerate(groups):
            lane = fields.get("lane", ALL)
            self.scheduler.add(one, lane, order, row, known or {}, fields.get("early_stop"))  # type: ignore[arg-type]
        self.assign()

    def assign(self) -> None:
        for worker, requests in self.scheduler.assign().items():
            for request in requests:
                assert request.id not in self.given[worker]
                self.given[worker][request.id] = request

    def finish(self, worker: int, sample: str, count: int = 3, reason: str = "stop") -> None:
        self.scheduler.report(worker, [tokens(self.given[worker].pop(sample), count, reason)], {})
        self.assign()

    def die(self, *workers: int, logged: dict[str, int] | None = None, killed: bool = True) -> dict[int, list[str]]:
        """`logged`: tokens that the log has of samples, beyond those they began with."""
        cancelled: dict[int, list[str]] = {}
        for worker in workers:
            self.scheduler.worker_lost(worker)
        self.assign()
        for worker in workers:
            known = {}
            for sample, progress in self.scheduler.in_flight(worker).items():
                request = self.given[worker][sample]
                known[sample] = copy.deepcopy(progress)
                known[sample].extend(tokens(request, (logged or {}).get(sample, 0), None))
            self.given[worker].clear()
            cancelled |= self.scheduler.worker_down(worker, known, killed)
            self.assign()
        for worker in workers:
            self.scheduler.worker_up(worker)
            self.assign()
        return cancelled

    def ended(self) -> dict[str, Ended]:
        return {ended.group.request.id: ended for ended in self.scheduler.take_ended()}

    def samples(self) -> Counter[str]:
        return Counter(sample for given in self.given.values() for sample in given)


def test_a_group_ends_with_its_samples_in_order() -> None:
    service = Service(1)
    service.submit(group("a", n=3))
    for number in (2, 0, 1):
        assert service.ended() == {}
        service.finish(0, f"a#{number}", count=number + 1)
    ended = service.ended()["a"]
    assert [len(completion.token_ids) for completion in ended.group.completions] == [1, 2, 3]
    assert ended.attempts == {"a#0": 0, "a#1": 0, "a#2": 0}
    assert service.scheduler.unfinished(ALL) == 0


def test_workers_are_kept_full_and_no_fuller() -> None:
    service = Service(2, running=3, ahead=1)
    service.submit(*(group(f"g{i}") for i in range(20)))
    assert [len(given) for given in service.given.values()] == [4, 4]
    assert service.scheduler.waiting == 12
    service.finish(0, next(iter(service.given[0])))
    assert [len(given) for given in service.given.values()] == [4, 4]


def test_the_longest_come_first_and_are_spread() -> None:
    service = Service(2, running=2)
    service.submit(
        *(group(f"short{i}", max_tokens=10) for i in range(4)), *(group(f"long{i}", max_tokens=90) for i in (0, 1))
    )
    for worker in (0, 1):
        assert [name[:4] for name in service.given[worker]] == ["long", "shor"]


def test_lengths_are_learned_by_domain() -> None:
    service = Service(1, running=1)
    service.submit(group("s", domain="short", max_tokens=50), group("l", domain="long", max_tokens=50))
    service.finish(0, "s#0", count=2)
    service.finish(0, "l#0", count=40)
    service.submit(group("wait", max_tokens=50))
    service.submit(group("s2", domain="short", max_tokens=50), group("l2", domain="long", max_tokens=50))
    service.finish(0, "wait#0")
    assert list(service.given[0]) == ["l2#0"]


def test_what_was_begun_and_what_came_first_goes_first() -> None:
    service = Service(1, running=1)
    service.submit(group("first"), group("begun"), known={"begun#0": Progress([0], [-1.0], [1], None, 0)})
    service.submit(group("later", max_tokens=100))
    order = []
    while service.given[0]:
        (sample,) = service.given[0]
        order.append(sample)
        service.finish(0, sample)
    # Placed before the group that had been begun was known.
    assert order == ["begun#0", "first#0", "later#0"] or order == ["first#0", "begun#0", "later#0"]


def test_a_lane_has_its_own_workers_now_and_later() -> None:
    service = Service(4, running=8)
    service.submit(*(group(f"g{i}") for i in range(8)), lane=(1, 2))
    assert not service.given[0] and not service.given[2]
    assert len(service.given[1]) == len(service.given[3]) == 4
    alone = Service(1)
    alone.submit(group("a"), lane=(1, 2))
    assert alone.scheduler.waiting == 1
    alone.scheduler.worker_up(3)
    alone.assign()
    assert list(alone.given[3]) == ["a#0"]


def test_a_domain_has_no_more_in_engines_than_allowed() -> None:
    service = Service(2, domain_running={"slow": 2})
    service.submit(group("slow", n=5, domain="slow"), group("fast", n=4, domain="fast"))
    assert Counter(sample[:4] for sample in service.samples()) == {"slow": 2, "fast": 4}
    worker, sample = next((w, s) for w, given in service.given.items() for s in given if s.startswith("slow"))
    service.finish(worker, sample)
    assert Counter(sample[:4] for sample in service.samples()) == {"slow": 2, "fast": 4}
    service.die(0)
    assert Counter(sample[:4] for sample in service.samples())["slow"] == 2


def test_a_session_stays_with_its_worker() -> None:
    service = Service(3, running=100)
    homes = set()
    for turn in range(5):
        service.submit(replace(group(f"turn{turn}", session="talk"), prompt_ids=[1] * 50))
        service.submit(group(f"other{turn}"))
        homes |= {worker for worker, given in service.given.items() if f"turn{turn}#0" in given}
    assert len(homes) == 1
    assert all(service.given.values())


def test_samples_go_on_elsewhere_from_their_logged_tokens() -> None:
    service = Service(2)
    service.submit(group("a", n=4))
    begun = list(service.given[0])
    service.die(0, logged={begun[0]: 5})
    resumed = {sample: request for given in service.given.values() for sample, request in given.items()}
    assert resumed[begun[0]].token_ids == [0, 1, 2, 3, 4]
    assert resumed[begun[0]].attempt == 1
    assert resumed[begun[1]].token_ids == []
    for worker in (0, 1):
        for sample in list(service.given[worker]):
            service.finish(worker, sample, count=10 - len(service.given[worker][sample].token_ids), reason="length")
    completions = service.ended()["a"].group.completions
    assert [completion.token_ids for completion in completions] == [list(range(10))] * 4


def test_what_was_finished_in_the_log_is_not_sampled_again() -> None:
    service = Service(1)
    done = Progress([7, 8], [-1.0, -2.0], [3, 4], "stop", 2)
    complete = Progress(list(range(10)), [-1.0] * 10, [3] * 10, None, 0)
    service.submit(group("a", n=2), known={"a#0": done, "a#1": complete})
    assert not service.given[0]
    ended = service.ended()["a"]
    first, second = ended.group.completions
    assert (first.token_ids, first.finish_reason, first.oldest_version, first.weight_version) == ([7, 8], "stop", 3, 4)
    assert second.finish_reason == "length"
    assert ended.attempts == {"a#0": 2, "a#1": 0}


def test_a_poisoned_request_is_found_and_no_other_is_blamed() -> None:
    """It ends every engine before a token comes; whatever runs beside it has no token either."""
    service = Service(2, running=8, deaths=2)
    service.submit(group("poison"), *(group(f"good{i}") for i in range(12)))
    lives = 0
    ended: dict[str, Ended] = {}
    while len(ended) < 13:
        for worker in (0, 1):
            if "poison#0" in service.given[worker]:
                service.die(worker)
                lives += 1
            else:
                for sample in list(service.given[worker])[:1]:
                    service.finish(worker, sample)
        ended |= service.ended()
        assert lives < 10
    assert "ended 4 engines in a row, on the last 2 of which it was alone" in str(ended["poison"].group.failure)
    assert all(ended[f"good{i}"].group.failure is None for i in range(12))
    assert lives == 4


@pytest.mark.parametrize("forgotten_in_time", [True, False])
def test_an_engine_that_a_poisoned_group_was_dropped_from_is_nobodys_fault(forgotten_in_time: bool) -> None:
    """Two samples of one poisoned request are tried on two engines at once; when the first is given up, so is the
    second, which may end its engine before that is told to forget it."""
    service = Service(2, running=8, deaths=1)
    service.submit(group("poison", n=2), *(group(f"good{i}") for i in range(4)))
    for _ in range(2):
        service.die(0, 1)
    assert [list(service.given[worker]) for worker in (0, 1)] == [["poison#0"], ["poison#1"]]
    assert service.die(0) == {1: ["poison#1"]}
    assert list(service.ended()) == ["poison"]
    assert list(service.given[1]) == ["poison#1"]  # still there, and nothing beside it
    if forgotten_in_time:
        service.given[1].clear()
        service.scheduler.worker_forgot(1, ["poison#1"])
        service.assign()
    else:
        assert service.die(1) == {}
    assert len(service.given[1]) == 1
    for worker in (0, 1) * 4:
        for sample in list(service.given[worker])[:1]:
            service.finish(worker, sample)
    assert {name: one.group.failure for name, one in service.ended().items()} == {f"good{i}": None for i in range(4)}


def test_deaths_with_tokens_in_between_blame_nobody() -> None:
    service = Service(1, deaths=2)
    service.submit(group("a", n=4, max_tokens=100))
    for _ in range(20):
        service.die(0, logged=dict.fromkeys(service.given[0], 1))
    assert len(service.given[0]) == 4
    service.die(0)
    for sample in list(service.given[0]):  # the first token clears them, before it is in the log
        service.scheduler.report(0, [], {sample: 21})
    service.assign()
    service.die(0)
    assert service.ended() == {}


def test_a_suspect_runs_alone() -> None:
    service = Service(1, deaths=5)
    service.submit(group("a", n=3), group("b"))
    service.die(0)
    service.die(0)
    assert len(service.given[0]) == 1
    (suspect,) = service.given[0]
    service.scheduler.report(0, [], {suspect: 1})
    service.assign()
    assert len(service.given[0]) == 1  # the next suspect waits for an empty engine
    service.finish(0, suspect)
    assert len(service.given[0]) == 1


def test_removing_a_worker_blames_nobody() -> None:
    service = Service(2, deaths=2)
    service.submit(group("a", n=8))
    for _ in range(5):
        service.die(0, killed=False)
    assert len(service.samples()) == 8
    assert service.ended() == {}


def test_cancelling_frees_engines_and_queue() -> None:
    service = Service(1, running=2)
    service.submit(group("a", n=3), group("b", n=1))
    assert service.scheduler.cancel(["a", "unknown"]) == ({0: ["a#0", "a#1"]}, {"a#0": 0, "a#1": 0})
    service.given[0].clear()
    service.assign()
    assert list(service.given[0]) == ["b#0"]
    assert service.scheduler.unfinished(ALL) == 1
    # What its worker had finished meanwhile is nobody's.
    late = SampleRequest("a#0", [1], [], Sampling(3), 0)
    assert service.scheduler.report(0, [tokens(late, 2)], {}) == []
    service.finish(0, "b#0")
    assert list(service.ended()) == ["b"]


@pytest.mark.parametrize(("verdicts", "stops"), [([1, 1, 1], True), ([0, 0, 0], True), ([1, 0, 1], False)])
def test_a_group_that_cannot_inform_is_stopped_if_asked_to(verdicts: list[float], stops: bool) -> None:
    service = Service(1, running=8)
    service.submit(group("a", n=6), early_stop=3)
    dropped: dict[int, list[str]] = {}
    for number, verdict in enumerate(verdicts):
        assert dropped == {}
        service.finish(0, f"a#{number}")
        dropped = service.scheduler.judge("a", verdict)
    assert dropped == ({0: ["a#3", "a#4", "a#5"]} if stops else {})
    assert [len(ended.group.completions) for ended in service.ended().values()] == ([3] if stops else [])
    assert service.scheduler.unfinished(ALL) == (0 if stops else 3)


@pytest.mark.parametrize("last", [0.0, 1.0])
def test_a_group_is_not_stopped_before_the_verdicts_on_all_that_has_ended(last: float) -> None:
    service = Service(1, running=8)
    service.submit(group("a", n=6), early_stop=2)
    for number in range(3):
        service.finish(0, f"a#{number}")
    assert [service.scheduler.judge("a", 1.0) for _ in range(2)] == [{}, {}]
    assert service.scheduler.judge("a", last) == ({0: ["a#3", "a#4", "a#5"]} if last else {})
    assert [len(ended.group.completions) for ended in service.ended().values()] == ([3] if last else [])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 6))
def test_whatever_happens_every_sample_ends_exactly_once(seed: int, workers: int, running: int) -> None:
    """Random ends, deaths, removals and additions; each completion has every position once."""
    chance = random.Random(seed)
    service = Service(workers, running=running, deaths=10**6)
    names = [f"g{i}" for i in range(12)]
    for start in range(0, 12, 3):
        service.submit(*(group(name, n=chance.randint(1, 4), domain=name[-1]) for name in names[start : start + 3]))
    ended: dict[str, Ended] = {}
    for _ in range(100_000):
        if len(ended) == len(names):
            break
        assert max(service.samples().values(), default=0) <= 1  # never on two engines
        worker = chance.randrange(workers)
        given = service.given[worker]
        if chance.random() < 0.2:
            logged = {name: chance.randint(0, 9 - len(request.token_ids)) for name, request in given.items()}
            service.die(worker, logged=logged, killed=chance.random() < 0.5)
        elif given:
            sample = chance.choice(list(given))
            service.finish(worker, sample, count=10 - len(given[sample].token_ids), reason="length")
        for name, one in service.ended().items():
            assert name not in ended
            ended[name] = one
    assert len(ended) == len(names)
    for one in ended.values():
        for completion in one.group.completions:
            assert completion.token_ids == list(range(10))
            assert completion.spans[0].begin == 0 and completion.spans[-1].end == 10
