"""Domains with an environment and files of conversations: from the recipe to prompts, episodes, rewards and rows."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from posttrain.data import DomainData, Problem, load_domains
from posttrain.data.calculations import demonstrate
from posttrain.data.efforts import in_every_effort, with_reasoning
from posttrain.data.encoding import encode_conversation, encode_prompt, render_prompt
from posttrain.data.layout import EOS
from posttrain.data.v4 import ToolCall, with_tools
from posttrain.errors import BadInput
from posttrain.observe.metrics import MetricsLog
from posttrain.recipe import Recipe
from posttrain.recipe.conversations import EnvironmentConfig
from posttrain.stages.episodes import (
    DomainEpisodes,
    check_episodes,
    episodes_of,
    policy_messages,
    taught_row,
    tools_of,
)
from posttrain.stages.scoring import DomainRewards
from posttrain.stages.sft import check_conversations, conversations_of
from rollouts.environments import Observation, SingleTurn, ToolUse, calculator, function_tool, schema_tool
from tests.episode_kit import TOKENIZER, call, play, says
from tests.recipe_kit import recipe_with

HERE = "tests.test_stages_episodes"
TOOL = function_tool(calculator)
OPENAI = schema_tool(
    {
        "type": "function",
        "function": {
            "name": "half",
            "description": "Half of a number.",
            "parameters": {"type": "object", "properties": {"number": {"type": "number"}}, "required": ["number"]},
        },
    },
    lambda number: number / 2,
)
SETTINGS: dict[str, Any] = {
    "domains.sums.source": {"calculations": {"min_digits": 3, "max_digits": 4}},
    "domains.sums.environment": {"tools": ["calculator"], "turns": 3, "turn_tokens": 180, "describe": False},
    "domains.sums.max_new_tokens": 260,
    "domains.words.source": {"reasoning_gym": "spell_backward", "params": {"min_word_len": 3, "max_word_len": 3}},
    "domains.words.train": 100,
    "domains.words.selection": 8,
    "rollout.max_model_len": 2048,
    "stages.base.max_length": 2048,
    "stages.experts.per_domain[0].max_length": 2048,
}


def one_answer(problem: Problem) -> SingleTurn:
    """A factory."""
    return SingleTurn(problem.messages)


def nothing(problem: Problem) -> str:
    """Not a factory."""
    return problem.id


class Retry:
    """A reasoning-gym problem that may be answered again, with what the verifier says."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def reset(self) -> list[dict[str, Any]]:
        return [*self.problem.messages]

    def step(self, turn):  # type: ignore[no-untyped-def]
        right = turn.content.strip() == self.problem.answer
        return Observation(() if right else ({"role": "user", "content": "Wrong, again."},), 1.0 if right else -0.25)


def bad_demonstration(problem: Problem) -> list[dict[str, Any]]:
    return [*problem.messages, {"role": "assistant", "content": "", "tool_calls": [ToolCall("abacus", {}).message()]}]


def recipe_of(changes: dict[str, Any] | None = None) -> Recipe:
    return Recipe.model_validate(recipe_with(copy.deepcopy(SETTINGS) | (changes or {})))


@pytest.fixture(scope="module")
def domains() -> dict[str, DomainData]:
    return load_domains(recipe_of())


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize(("given", "seconds"), [({}, 10.0), ({"tool_seconds": 2.5}, 2.5)])
def test_the_recipe_says_how_long_a_call_may_take(given: dict[str, Any], seconds: float) -> None:
    config = EnvironmentConfig.model_validate({"tools": ["calculator"], **given})
    assert [tool.seconds for tool in tools_of("sums", config)] == [seconds]


def test_a_tool_domains_episodes_travel_and_other_domains_have_none(
    domains: dict[str, DomainData], tokenizer_path: str
) -> None:
    recipe = recipe_of()
    problem, word = domains["sums"].train[0], domains["words"].train[0]
    assert episodes_of(recipe, tokenizer_path, [word]) is None
    episodes: DomainEpisodes = pickle.loads(pickle.dumps(DomainEpisodes(recipe, tokenizer_path, [problem, word])))
    assert problem.id in episodes and word.id not in episodes
    episode = episodes.begin(problem.id, 260)
    assert episode.prompt_ids == encode_prompt(TOKENIZER, problem.messages) and episode.budget == 180
    assert episodes.begin(problem.id, 60).budget == 60
    play(episode, [says(call(problem.entry["expression"])), says(problem.answer + EOS)])
    assert (episode.outcome, episode.answer) == ("answered", problem.answer)


def test_described_tools_are_in_the_prompt_and_openais_functions_can_be_used(
    domains: dict[str, DomainData], tokenizer_path: str
) -> None:
    tools = {"tools": [f"{HERE}:OPENAI", "calculator"]}
    recipe, problem = recipe_of({"domains.sums.environment": tools}), domains["sums"].train[0]
    messages = policy_messages(recipe, problem)
    assert messages == with_tools(problem.messages, [OPENAI.schema(), TOOL.schema()])
    assert "Half of a number." in render_prompt(messages)
    episode = DomainEpisodes(recipe, tokenizer_path, [problem]).begin(problem.id, 260)
    assert episode.prompt_ids == encode_prompt(TOKENIZER, messages)
    half = call("7").replace("calculator", "half").replace("expression", "number").replace('"true"', '"false"')
    play(episode, [says(half), says(f"?{EOS}")])
    assert episode.messages[-2] == {"role": "tool", "content": "3.5"}


def test_reasoning_gyms_problems_are_environments_of_one_turn_or_of_a_factorys(
    domains: dict[str, DomainData], tokenizer_path: str
) -> None:
    word = domains["words"].train[0]
    recipe = recipe_of({"domains.words.environment": {"factory": f"{HERE}:one_answer"}})
    episode = DomainEpisodes(recipe, tokenizer_path, [word]).begin(word.id, 9)
    play(episode, [says(word.answer + EOS)])
    assert episode.answer == word.answer
    recipe = recipe_of({"domains.words.environment": {"factory": f"{HERE}:Retry"}})
    episode = DomainEpisodes(recipe, tokenizer_path, [word]).begin(word.id, 90)
    play(episode, [says(f"x{EOS}"), says(word.answer + EOS)])
    assert (episode.answer, episode.reward) == (word.answer, 0.75)
    recipe = recipe_of({"domains.words.environment": {"factory": f"{HERE}:nothing"}})
    with pytest.raises(BadInput, match=r"domains\.words\.environment\.factory: .*nothing returned a str without"):
        policy_messages(recipe, word)


def test_rewards_see_the_last_turn_and_how_the_episode_ended(
    domains: dict[str, DomainData], tokenizer_path: str, tmp_path: Path
) -> None:
    problem, word = domains["sums"].train[0], domains["words"].train[0]
    log = MetricsLog(tmp_path / "metrics.jsonl")
    rewards = DomainRewards(recipe_of(), tokenizer_path, [problem, word], "s", log)
    rewards = pickle.loads(pickle.dumps(rewards))
    asked, answered = TOKENIZER.encode(call("6*7")), TOKENIZER.encode(problem.answer + EOS)
    text, result = rewards.judge(problem.id, asked + answered, "stop")
    assert (text, result.correct) == (problem.answer, True)
    assert rewards.judge(problem.id, answered, "stop")[1].correct
    assert rewards.judge(problem.id, answered + asked, "turn_limit")[0] == ""
    assert not rewards.judge(problem.id, asked + answered[:-1], "length")[1].correct
    assert rewards.judge(word.id, TOKENIZER.encode(word.answer + EOS), "stop")[1].correct
    mixed = [(word, word.answer + EOS), (problem, "7" + EOS), (word, "?" + EOS), (problem, problem.answer + EOS)]
    judged = rewards.judge_all(
        [one.id for one, _ in mixed], [TOKENIZER.encode(said) for _, said in mixed], ["stop"] * 4
    )
    assert [(text + EOS, result.correct) for text, result in judged] == [
        (said, said == one.answer + EOS) for one, said in mixed
    ]
    totals, _ = rewards([problem.id] * 2, [asked, answered], ["failed: OSError: no disk", "stop"])
    assert math.isnan(totals[0]) and totals[1] == 1
    assert "its environment failed: OSError: no disk" in (tmp_path / "metrics.jsonl").read_text()


MODES: dict[str, Any] = {
    "chat": {"max_new_tokens": 200},
    "high": {"max_new_tokens": 260, "reasoning": f"{HERE}:aloud", "prefix": "Think.\n"},
}


def aloud(problem: Problem) -> str:
    return f"I need {problem.entry['expression']}."


def test_a_domain_has_tools_in_every_mode(domains: dict[str, DomainData], tokenizer_path: str, tmp_path: Path) -> None:
    shown = {"demonstrations": "posttrain.data.calculations:demonstrate"}
    environment = SETTINGS["domains.sums.environment"] | shown
    recipe = recipe_of({"domains.sums.modes": MODES, "domains.sums.environment": environment})
    check_episodes(recipe, TOKENIZER, domains)
    config = recipe.domains["sums"]
    chat, high = with_reasoning(in_every_effort([domains["sums"].train[0]], config.modes), config)
    expression, answer = chat.entry["expression"], chat.answer
    turns = {
        chat.id: [call(expression), f"{answer}{EOS}"],
        high.id: [f"I need {expression}.</think>{call(expression)}", f"</think>{answer}{EOS}"],
    }
    episodes = DomainEpisodes(recipe, tokenizer_path, [chat, high])
    rewards = DomainRewards(recipe, tokenizer_path, [chat, high])
    for problem in (chat, high):
        said = turns[problem.id]
        row = taught_row(recipe, TOKENIZER, problem)
        assert TOKENIZER.decode([token for token in row["labels"] if token >= 0]) == "".join(said)
        episode = episodes.begin(problem.id, config.new_tokens(problem.effort))
        play(episode, [says(turn) for turn in said])
        assert episode.outcome == "answered" and [*episode.prompt_ids, *episode.token_ids] == row["input_ids"]
        completion = episode.completion()
        text, result = rewards.judge(problem.id, completion.sampled_ids, completion.finish_reason)
        assert (text, result.correct) == (said[-1].removesuffix(EOS), True)
    _, answer_of = rewards._answer(high, TOKENIZER.encode("".join(turns[high.id])), "stop")
    assert answer_of.reasoning_tokens == len(aloud(high)) + 2 and answer_of.text == answer
    with pytest.raises(BadInput, match=r"domains\.sums\.modes\.chat\.max_new_tokens is 150; the longest demonstration"):
        modes = MODES | {"chat": {"max_new_tokens": 150}}
        check_episodes(
            recipe_of({"domains.sums.modes": modes, "domains.sums.environment": environment}), TOKENIZER, domains
        )


# What is taught


@pytest.mark.parametrize("describe", [True, False])
def test_demonstrations_are_taught_instead_of_answers(domains: dict[str, DomainData], describe: bool) -> None:
    settings = {"tools": ["calculator"], "describe": describe}
    demonstrated = settings | {"demonstrations": "posttrain.data.calculations:demonstrate"}
    problem = domains["sums"].train[0]
    messages = demonstrate(problem)
    declared = with_tools(messages, [TOOL.schema()]) if describe else messages
    ids, mask = encode_conversation(TOKENIZER, declared, known_tools=[] if describe else ["calculator"])
    row = taught_row(recipe_of({"domains.sums.environment": demonstrated}), TOKENIZER, problem)
    assert row["input_ids"] == ids
    assert row["labels"] == [token if one else -100 for token, one in zip(ids, mask, strict=True)]
    learned = TOKENIZER.decode([token for token in row["labels"] if token >= 0])
    assert learned == call(problem.entry["expression"]) + problem.answer + EOS
    recipe = recipe_of({"domains.sums.environment": settings})
    row = taught_row(recipe, TOKENIZER, problem)
    prompt = encode_prompt(TOKENIZER, policy_messages(recipe, problem))
    assert row["input_ids"] == prompt + TOKENIZER.encode(problem.answer + EOS)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"rollout.max_model_len": 270}, "max_model_len is 270; domains.sums needs"),
        ({"domains.sums.max_new_tokens": 180}, "max_new_tokens is 180; the longest demonstration has"),
        ({"domains.sums.environment.turn_tokens": 100}, "turn_tokens is 100; the longest turn of a demonstration has"),
        ({"stages.base.max_length": 64}, "stages.base: max_length is 64; the longest example of domains.sums has"),
        (
            {"domains.sums.environment.demonstrations": f"{HERE}:bad_demonstration"},
            "bad_demonstration on sums/.*: message 1: .*abacus",
        ),
        ({"domains.sums.environment.describe": True, "rollout.max_model_len": 1024}, "max_model_len is 1024"),
    ],
)
def test_a_domain_whose_episodes_do_not_fit_is_bad_input(
    domains: dict[str, DomainData], changes: dict[str, Any], complaint: str
) -> None:
    demonstrations = {"domains.sums.environment.demonstrations": "posttrain.data.calculations:demonstrate"}
    check_episodes(recipe_of(demonstrations), TOKENIZER, domains)
    with pytest.raises(BadInput, match=complaint):
        check_episodes(recipe_of(demonstrations | changes), TOKENIZER, domains)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"stages.base.conversations": {"jsonl": str(path)}}


def said(user: str, *answers: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": user}]
    for answer in answers:
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And?"}]
    return {"messages": messages[:-1]}


def test_every_turn_of_a_conversation_is_learned(domains: dict[str, DomainData], tmp_path: Path) -> None:
    undeclared = {"messages": demonstrate(domains["sums"].train[0])}
    changes = write_rows(tmp_path / "said.jsonl", [said("Hi.", "Hello.", "Nothing."), undeclared])
    recipe = recipe_of(changes)
    check_conversations(recipe, TOKENIZER, domains)
    assert recipe.stages.base is not None
    found = conversations_of(recipe, "base", recipe.stages.base, TOKENIZER, domains)
    assert len(found.conversations) == 2
    from posttrain.stages.sft import _encoded

    row = _encoded(recipe, TOKENIZER, found.conversations[0])
    learned = TOKENIZER.decode([token for token in row["labels"] if token >= 0])
    assert learned == f"Hello.{EOS}Nothing.{EOS}"


def test_bad_conversations_are_named_by_line_or_left_out(domains: dict[str, DomainData], tmp_path: Path) -> None:
    held_out = domains["sums"].holdout[0]
    rows = [
        said("Hi.", "Hello."),
        said(held_out.messages[-1]["content"], held_out.answer),
        said("Long?", "x" * 3000),
        said("Umlaut?", "ä"),
        {"messages": [{"role": "robot", "content": ""}]},
        bad_tool_call(),
    ]
    changes = write_rows(tmp_path / "said.jsonl", rows)
    with pytest.raises(BadInput) as error:
        check_conversations(recipe_of(changes), TOKENIZER, domains)
    lines = str(error.value).splitlines()
    assert lines[0] == "stages.base.conversations has bad rows:"
    assert "said.jsonl:2: its prompt is one that domains.sums selects on or holds out" in lines[1]
    assert "said.jsonl:3: has 3" in lines[2] and "max_length is 2048" in lines[2]
    assert "said.jsonl:4: the tokenizer does not know every character" in lines[3]
    assert "said.jsonl:5: message 0: " in lines[4] and "robot" in lines[4]
    assert "said.jsonl:6: message 1: " in lines[5] and "abacus" in lines[5]
    recipe = recipe_of(changes | {"stages.base.conversations.bad_rows": "drop"})
    assert recipe.stages.base is not None
    found = conversations_of(recipe, "base", recipe.stages.base, TOKENIZER, domains)
    assert (len(found.conversations), len(found.dropped)) == (1, 5)


def bad_tool_call() -> dict[str, Any]:
    calling = {"role": "assistant", "content": "", "tool_calls": [ToolCall("abacus", {}).message()]}
    return {"messages": [{"role": "user", "content": "?"}, calling]}


def test_tools_are_the_recipes(domains: dict[str, DomainData]) -> None:
    environment = ToolUse(domains["sums"].train[0].messages, [OPENAI])
    assert environment.reset()[0]["tools"] == [OPENAI.schema()]
