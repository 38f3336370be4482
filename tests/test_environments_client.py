"""Groups of episodes from a rollout service: which turns are asked for, when, and what comes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import count

import pytest

from posttrain.data.encoding import encode_prompt
from posttrain.data.layout import ASSISTANT, EOS, USER
from posttrain.errors import RunFailed
from rollouts.environments import EpisodeClient, Limits, Observation, SingleTurn, ToolUse, calculator, function_tool
from rollouts.types import EpisodeFacts, FinishedGroup, GroupRequest, Sampling, VersionSpan
from tests.episode_kit import TOKENIZER, LocalEpisodes, ScriptedService, call, says

QUESTIONS = {"d/0": "6*7", "d/1": "12*12"}
LIMITS = Limits(turns=3, tokens=0, turn_tokens=200)
TOOL = function_tool(calculator)


def question(expression: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{expression}="}]


def episodes() -> LocalEpisodes:
    """The questions with a calculator."""

    def environment(expression: str) -> Callable[[], ToolUse]:
        return lambda: ToolUse(question(expression), [TOOL], describe=False)

    return LocalEpisodes({name: environment(expression) for name, expression in QUESTIONS.items()}, LIMITS)


def group(number: int, n: int = 2, problem_id: str | None = None) -> GroupRequest:
    problem_id = problem_id or f"d/{number}"
    prompt_ids = encode_prompt(TOKENIZER, question(QUESTIONS.get(problem_id, "1+1")))
    return GroupRequest(
        f"s/0/{number}", prompt_ids, Sampling(300, 0.7, n=n, seed=5), number, "d", problem_id=problem_id
    )


def solves(request: GroupRequest, prompt: str) -> str:
    """Calls the calculator, and copies its result; sample 1 of problem 0 says it is 41."""
    if request.id.startswith("s/0/0/1/"):
        return f"41{EOS}"
    if "<tool_result>" in prompt:
        return prompt.rpartition("<tool_result>")[2].partition("</tool_result>")[0] + EOS
    return call(prompt.partition(USER)[2].partition("=")[0])


def test_a_group_of_episodes_comes_back_as_one_completion_each() -> None:
    service = ScriptedService(solves)
    client = EpisodeClient(service, episodes())
    client.publish({}, 4)
    client.submit([group(0), group(1)])
    finished = client.collect(2, ["s/0/0", "s/0/1"])
    assert [one.request for one in finished] == [group(0), group(1)]
    (solved, guessed), (other, _) = (one.completions for one in finished)
    asked, answered = TOKENIZER.encode(call("6*7")), TOKENIZER.encode(f"42{EOS}")
    between = len(solved.token_ids) - len(asked) - len(answered)
    assert TOKENIZER.decode(solved.token_ids[len(asked) : -len(answered)]).startswith(f"{USER}<tool_result>42<")
    assert solved.episode == EpisodeFacts([1] * len(asked) + [0] * between + [1] * len(answered), 2, 1, 0)
    assert solved.logprobs == says(call("6*7")).logprobs + [0.0] * between + says(f"42{EOS}").logprobs
    assert solved.spans == (VersionSpan(0, len(solved.token_ids), 4),)
    assert guessed.token_ids == TOKENIZER.encode(f"41{EOS}") and guessed.episode == EpisodeFacts([1, 1, 1], 1, 0, 0)
    assert TOKENIZER.decode(other.token_ids).endswith(f"{ASSISTANT}</think>144{EOS}")
    assert {one.finish_reason for one in (solved, guessed, other)} == {"stop"}


def test_turns_are_requests_with_names_and_random_numbers_of_their_own() -> None:
    services = ScriptedService(solves), ScriptedService(solves)
    for service in services:
        client = EpisodeClient(service, episodes())
        client.submit([group(0), group(1)])
        client.collect(2)
    first, again = services
    assert {request.id: request for request in first.asked} == {request.id: request for request in again.asked}
    by_id = {request.id: request for request in first.asked}
    assert set(by_id) == {f"s/0/{name}" for name in ("0/0/0", "0/0/1", "0/1/0", "1/0/0", "1/0/1", "1/1/0", "1/1/1")}
    # The index tells the groups of a batch apart, the seed the episodes of a group and their turns.
    assert len({(request.sampling.seed, request.index) for request in first.asked}) == 7
    assert by_id["s/0/0/0/0"].sampling.seed == by_id["s/0/1/0/0"].sampling.seed
    for name, request in by_id.items():
        assert (request.index, request.session, request.domain) == (int(name[4]), name.rpartition("/")[0], "d")
        assert (request.sampling.n, request.sampling.temperature) == (1, 0.7)
    turn = by_id["s/0/1/0/1"]
    assert turn.prompt_ids[: len(group(1).prompt_ids)] == group(1).prompt_ids
    assert turn.sampling.max_tokens == 300 - (len(turn.prompt_ids) - len(group(1).prompt_ids))


def test_episodes_do_not_wait_for_one_another() -> None:
    service = ScriptedService(solves)
    client = EpisodeClient(service, episodes())
    client.submit([group(0, n=1), group(1, n=1)])
    assert [one.request.id for one in client.collect(1)] == ["s/0/1"]  # both of its turns, before any of the other
    assert [request.id for request in service.asked] == ["s/0/0/0/0", "s/0/1/0/0", "s/0/1/0/1"]


def test_problems_without_an_environment_are_answered_by_the_service_itself() -> None:
    service = ScriptedService(solves)
    client = EpisodeClient(service, episodes())
    plain = group(2, problem_id="other/2")
    client.submit([group(0), plain])
    assert service.asked[-1] == plain
    finished = client.collect(2, ["s/0/2", "s/0/0"])
    assert finished[0] == FinishedGroup(plain, [says(call("1+1"), 0)] * 2)
    client.acknowledge(["s/0/2", "s/0/0"])
    assert Counter(service.acknowledged) == Counter(["s/0/2", "s/0/0/0/0", "s/0/0/0/1", "s/0/0/1/0"])


def test_what_was_learned_from_stays_in_the_log_turn_by_turn_until_its_stage_is_over() -> None:
    service = ScriptedService(solves)
    client = EpisodeClient(service, episodes())
    client.submit([group(0)])
    client.collect(1)
    client.consume(["s/0/0"])
    assert Counter(service.consumed) == Counter(["s/0/0/0/0", "s/0/0/0/1", "s/0/0/1/0"])
    assert not service.acknowledged
    client.forget_under("s/")
    assert service.forgotten == ["s/"]


def test_a_group_with_a_turn_that_is_given_up_is_given_up_whole() -> None:
    service = ScriptedService(solves)
    service.failing.add("s/0/1/1/1")
    client = EpisodeClient(service, episodes())
    client.submit([group(0), group(1)])
    failed, whole = client.collect(2, ["s/0/1", "s/0/0"])
    assert failed == FinishedGroup(group(1), [], "it ended 3 engines")
    assert "s/0/1/0/0" in service.cancelled and len(whole.completions) == 2
    client.acknowledge(["s/0/0", "s/0/1"])
    with pytest.raises(RunFailed, match="more groups are collected than were submitted"):
        client.collect(1)


def test_what_is_cancelled_is_asked_for_no_further() -> None:
    service = ScriptedService(solves)
    client = EpisodeClient(service, episodes())
    client.submit([group(0), group(1)])
    client.cancel(["s/0/1"])
    assert [request.id for request in service.running] == ["s/0/0/0/0", "s/0/0/1/0"]
    assert [one.request.id for one in client.collect(1)] == ["s/0/0"]


def test_an_environment_that_begins_differently_each_time_is_refused() -> None:
    numbers = count()

    class Changing:
        def reset(self):  # type: ignore[no-untyped-def]
            return question(f"{next(numbers)}*7")

        def step(self, turn):  # type: ignore[no-untyped-def]
            return Observation()

    client = EpisodeClient(ScriptedService(solves), LocalEpisodes({"d/0": Changing}, LIMITS))
    with pytest.raises(RunFailed, match="the environment of d/0 begins in another way each time"):
        client.submit([group(0)])


def test_playing_gives_the_episodes_of_each_problem_in_order() -> None:
    service = ScriptedService(solves)
    client = EpisodeClient(service, episodes())
    played = client.play(["d/1", "d/0"], Sampling(300, n=2))
    answers = [[TOKENIZER.decode(one.token_ids)[-4 - len(EOS) :] for one in group] for group in played]
    assert answers == [[f">144{EOS}"] * 2, [f"k>42{EOS}"] * 2]
    assert not service.running and len(service.acknowledged) == 8
    single = EpisodeClient(
        ScriptedService(lambda request, prompt: f"no{EOS}"),
        LocalEpisodes({"d/0": lambda: SingleTurn(question("1"))}, LIMITS),
    )
    assert single.play(["d/0"], Sampling(9))[0][0].episode == EpisodeFacts([1, 1, 1], 1, 0, 0)
