"""When samples go to which teachers: before the whole batch is there, and to those whose turn it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from torch import Tensor

from posttrain.errors import BadInput
from posttrain.recipe.schema import RolloutConfig
from posttrain.trainers.jobs import OpdJob, Teacher
from posttrain.trainers.opd import train_opd
from posttrain.trainers.progress import Progress
from rollouts.types import FinishedGroup
from tests.test_trainers_opd import TEXTS, LocalTeachers, job, train
from tests.trainers_kit import LocalClient, Recorder, save, tiny_model, tiny_tokenizer


@pytest.fixture
def experts(tmp_path: Path) -> dict[str, str]:
    return {name: save(tiny_model(seed), tmp_path / name) for seed, name in enumerate(TEXTS, start=1)}


class Watching(LocalTeachers):
    """Teachers that note how many samples the engines are working on when they are asked."""

    def __init__(self, client: LocalClient) -> None:
        super().__init__()
        self.client = client
        self.running: list[int] = []

    def hidden_states(
        self, teacher: str, sequences: Sequence[Sequence[int]], kept: Sequence[int], dtype: str | None
    ) -> Callable[[], Tensor]:
        self.running.append(len(self.client.running))
        return super().hidden_states(teacher, sequences, kept, dtype)


def taught(
    stage: OpdJob, client: LocalClient | None = None, rollout: RolloutConfig | None = None
) -> tuple[Watching, list[dict[str, float]]]:
    """Train a student; what its teachers were asked, and its metrics."""
    student, recorder = tiny_model(0), Recorder()
    client = client or LocalClient(copy.deepcopy(student))
    pool = Watching(client)
    stage = OpdJob(**(vars(stage) | {"rollout": rollout or RolloutConfig()}))
    train_opd(student, tiny_tokenizer(), stage, client, pool, 3, Progress(recorder, "student", stage.config.steps))
    return pool, recorder.lines


SLOW_SUMS = {f"student/{step}/{row}": 30 for step in range(2) for row in range(4, 8)}
"""The second domain's groups wait for 30 steps of the engine after their first token."""


def test_a_domain_is_scored_while_the_next_one_is_still_generated(experts: dict[str, str]) -> None:
    pool, lines = taught(job(experts, steps=2), LocalClient(tiny_model(0), delays=SLOW_SUMS))
    assert [teacher for teacher, _ in pool.asked] == [experts["letters"], experts["sums"]] * 2
    assert pool.running[0] == 4 and pool.running[1] == 0, "letters were sent while all sums were being sampled"
    assert all(line["seconds_asked_ahead"] > 0 for line in lines)
    at_once, others = taught(job(experts, steps=2))
    assert [line["loss"] for line in lines] == [line["loss"] for line in others]
    assert pool.asked == at_once.asked


def test_batches_of_whatever_finished_first_are_sent_as_a_whole(experts: dict[str, str]) -> None:
    client = LocalClient(tiny_model(0), steps_between=3)
    pool, lines = taught(job(experts, steps=4), client, RolloutConfig(mode="async"))
    assert any(pool.running), "the next batch is generated meanwhile"
    assert {line["seconds_asked_ahead"] for line in lines} == {0.0}
    assert sum(len(rows) for _, rows in pool.asked) == 4 * 8


class Unlucky(LocalClient):
    """Gives up one of the first domain's groups."""

    def answer(self, request, completions):  # type: ignore[no-untyped-def]
        failed = request.id == "student/0/1"
        return FinishedGroup(request, [] if failed else completions, "it kills engines" if failed else None)


def test_a_group_that_was_given_up_is_not_sent(experts: dict[str, str]) -> None:
    pool, (line,) = taught(job(experts), Unlucky(tiny_model(0)))
    assert [len(rows) for _, rows in pool.asked] == [3, 4] and line["share/letters"] == pytest.approx(3 / 7)


def test_teachers_come_and_go_and_take_each_others_places(experts: dict[str, str], tmp_path: Path) -> None:
    better = save(tiny_model(7), tmp_path / "better")
    turns = [
        Teacher("sums", experts["sums"], last_step=3),
        Teacher("letters", experts["letters"], first_step=2, last_step=2),
        Teacher("better", better, first_step=4),
    ]
    *_, pool, _ = lines, *_ = train(tiny_model(0), {"sums": turns}, steps=5, batch_size=4)
    first, second = experts["sums"], experts["letters"]
    assert [teacher for teacher, _ in pool.asked] == [first, first, second, first, better, better]
    assert pool.released == [second, first], "after their last steps"
    assert ["kl/sums/letters" in line for line in lines] == [False, True, False, False, False]
    assert all(line["kl/sums"] > 0 for line in lines)


def test_a_teacher_that_another_domain_still_needs_is_not_released(experts: dict[str, str]) -> None:
    one = experts["sums"]
    teachers = {
        "sums": [Teacher("sums", one, last_step=1), Teacher("letters", experts["letters"], first_step=2)],
        "letters": [Teacher("sums", one, last_step=2), Teacher("letters", experts["letters"], first_step=3)],
    }
    *_, pool, _ = train(tiny_model(0), teachers, steps=3)
    assert pool.released == [one]


def test_a_step_that_nobody_teaches_is_refused_before_the_first(experts: dict[str, str]) -> None:
    late = [Teacher("sums", experts["sums"], first_step=2)]
    with pytest.raises(BadInput, match=r"stage student: nobody teaches sums in step 1; was its teacher dropped\?"):
        train(tiny_model(0), {"sums": late}, steps=3)


@pytest.mark.parametrize("options", [{"divergence": "forward_kl"}, {"top_k": 4}, {"divergence": "sampled_token"}])
def test_other_objectives_report_the_reverse_kl_as_well(options: dict[str, object], experts: dict[str, str]) -> None:
    (plain,), *_ = train(tiny_model(0), experts)
    (other,), *_ = train(tiny_model(0), experts, **options)
    assert other["reverse_kl"] == pytest.approx(plain["kl"], abs=1e-5)
    assert other["kl"] != pytest.approx(plain["kl"], abs=1e-3) and "reverse_kl" not in plain
