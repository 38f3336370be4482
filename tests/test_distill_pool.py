"""The pool of teacher workers in Ray: overlap, swaps, and workers that die."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from distill.canary import Canary
from distill.pool import TeacherPool, start_teachers
from posttrain.errors import BadInput, RunFailed
from posttrain.trainers.opd import train_opd
from posttrain.trainers.progress import Progress
from tests.ray_kit import cluster_for_actors
from tests.test_distill import KEPT, SEQUENCES
from tests.test_trainers_opd import TEXTS, job
from tests.trainers_kit import VOCABULARY, LocalClient, Recorder, save, tiny_model, tiny_tokenizer

CANARY = Canary(SEQUENCES, VOCABULARY)


@pytest.fixture(scope="module")
def options() -> Iterator[dict[str, object]]:
    with cluster_for_actors(0.1) as options:
        yield options


@pytest.fixture(scope="module")
def pool(options: dict[str, object]) -> TeacherPool:
    """Two workers, each with room for one teacher."""
    return start_teachers(2, "hf", budget_bytes=1, actor_options=options)


def fresh(pool: TeacherPool, *workers: int) -> TeacherPool:
    """The same workers, or some, and nothing known of them."""
    return TeacherPool([pool.workers[index] for index in workers])


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("experts")
    return {name: save(tiny_model(seed), directory / name) for seed, name in enumerate(TEXTS, start=1)}


def student_after(pool: TeacherPool, experts: dict[str, str]) -> tuple[list[float], torch.Tensor]:
    """Losses of two steps and the weights after them."""
    student, recorder = tiny_model(0), Recorder()
    client = LocalClient(copy.deepcopy(student))
    train_opd(student, tiny_tokenizer(), job(experts, steps=2), client, pool, 3, Progress(recorder, "student", 2))
    weights = torch.cat([parameter.detach().flatten() for parameter in student.parameters()])
    return [line["loss"] for line in recorder.lines], weights


def test_states_are_the_same_whichever_worker_serves(pool: TeacherPool, experts: dict[str, str]) -> None:
    first, second = (fresh(pool, index) for index in (0, 1))
    teachers = list(experts.values())
    pending = [one.hidden_states(teacher, SEQUENCES, KEPT) for one in (first, second) for teacher in teachers]
    states = [one() for one in pending]  # two teachers that do not fit beside each other, in flight together
    for index in range(2):
        assert torch.equal(states[index], states[2 + index])
        assert torch.equal(first.head(teachers[index])(), second.head(teachers[index])())
    assert not torch.equal(states[0], states[1])
    work = first.take_work()
    assert set(work) == set(teachers)
    for one in work.values():
        assert one.seconds_compute > 0 and one.bytes_loaded > 0 and one.seconds_load > 0
        assert one.bytes_returned == states[0].nbytes
    assert first.take_work() == {}


def test_a_block_leaves_the_store_when_it_is_read(pool: TeacherPool, experts: dict[str, str]) -> None:
    pending = fresh(pool, 0).hidden_states(experts["sums"], SEQUENCES, KEPT)
    references = pending.args[0].references
    assert len(references) == len(SEQUENCES) + 1
    pending()
    assert references == []


def test_a_teacher_that_cannot_teach_is_refused_by_name(pool: TeacherPool, tmp_path: Path) -> None:
    wider = save(tiny_model(0, vocabulary=50), tmp_path / "wider")
    with pytest.raises(BadInput, match=r"wider has a vocabulary of 50 tokens, the student one of 43"):
        fresh(pool, 0, 1).examine([wider], CANARY)
    with pytest.raises(BadInput, match=r"nothing is not a model checkpoint"):
        fresh(pool, 0, 1).examine([str(tmp_path / "nothing")], CANARY)


def test_a_teacher_that_vanished_is_an_error_and_never_zeros(pool: TeacherPool, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"gone gives no answer \(worker 0: .*; worker 1: "):
        fresh(pool, 0, 1).hidden_states(str(tmp_path / "gone"), SEQUENCES, KEPT)()


def test_a_killed_worker_changes_no_bit_of_the_loss(
    pool: TeacherPool, options: dict[str, object], experts: dict[str, str]
) -> None:
    expected = student_after(fresh(pool, 0), experts)

    class Killing(TeacherPool):
        """Kills a worker, for good, when it has been given its part of the first batch."""

        kills = 1

        def hidden_states(self, *arguments, **named):  # type: ignore[no-untyped-def]
            pending = super().hidden_states(*arguments, **named)
            if self.kills:
                self.kills -= 1
                ray.kill(self.workers[self._owners[arguments[0]]], no_restart=True)
            return pending

    doomed = start_teachers(1, "hf", budget_bytes=1, actor_options=options).workers
    losses, weights = student_after(Killing([*doomed, pool.workers[1]]), experts)
    assert losses == expected[0]
    assert torch.equal(weights, expected[1])

    last = TeacherPool(doomed)
    with pytest.raises(RunFailed, match=r"no teacher worker is left"):
        last.hidden_states(experts["sums"], SEQUENCES, KEPT)()
