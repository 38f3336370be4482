"""Episodes as tokens: what the model sampled, what the environment answered, and where they end."""

from __future__ import annotations

from dataclasses import replace

import pytest

from posttrain.data.calculations import demonstrate, generate_calculations
from posttrain.data.encoding import encode_conversation, encode_prompt, encode_text
from posttrain.data.layout import ASSISTANT, DSML, EOS, THINK_END, THINK_START, USER
from posttrain.data.v4 import with_tools
from posttrain.errors import BadInput
from rollouts.environments import (
    Episode,
    Limits,
    Observation,
    SingleTurn,
    ToolUse,
    calculator,
    function_tool,
)
from rollouts.types import Completion, EpisodeFacts
from tests.episode_kit import TOKENIZER, call, play, says

CALCULATOR = function_tool(calculator)
LIMITS = Limits(turns=4, tokens=1000, turn_tokens=200)
PROBLEMS = generate_calculations("sums", {"train": 6, "selection": 0, "holdout": 0}, 0).train
QUESTION = [{"role": "user", "content": "6*7="}]


class Chatter:
    """Answers every turn with a user's message, and ends when it is told to."""

    def reset(self):
        return QUESTION

    def step(self, turn):
        if turn.content == "crash":
            raise RuntimeError("no connection")
        return Observation(() if turn.content == "bye" else ({"role": "user", "content": "go on"},), reward=0.5)


def test_an_episode_with_a_tool():
    episode = Episode(TOKENIZER, ToolUse(QUESTION, [CALCULATOR], describe=False), LIMITS)
    assert episode.prompt_ids == encode_prompt(TOKENIZER, QUESTION)
    asked, answered = says(call("6*7")), says(f"42{EOS}", version=4)
    episode.advance(asked)
    assert episode.outcome is None and episode.budget == 200
    assert TOKENIZER.decode(episode.context_ids[len(episode.prompt_ids) + len(asked.token_ids) :]) == (
        f"{USER}<tool_result>42</tool_result>{ASSISTANT}{THINK_END}"
    )
    episode.advance(answered)
    assert (episode.outcome, episode.answer, episode.reward) == ("answered", "42", 0.0)
    between = len(episode.token_ids) - len(asked.token_ids) - len(answered.token_ids)
    assert episode.loss_mask == [1] * len(asked.token_ids) + [0] * between + [1] * len(answered.token_ids)
    whole = episode.completion()
    assert whole.token_ids == episode.token_ids and whole.finish_reason == "stop"
    assert whole.logprobs == asked.logprobs + [0.0] * between + answered.logprobs
    assert whole.versions == [3] * (len(asked.token_ids) + between) + [4] * len(answered.token_ids)
    assert [message["role"] for message in episode.messages] == ["user", "assistant", "tool", "assistant"]
    assert whole.episode == EpisodeFacts(episode.loss_mask, turns=2, tool_calls=1, tool_errors=0)
    assert whole.sampled_ids == asked.token_ids + answered.token_ids


@pytest.mark.parametrize("mode", ["chat", "thinking", "thinking_max"])
@pytest.mark.parametrize("describe", [True, False])
def test_a_demonstration_played_turn_by_turn_has_the_tokens_that_it_is_taught_with(mode, describe):
    for problem in PROBLEMS:
        messages = demonstrate(problem, "Too hard for my head.")
        declared = with_tools(messages, [CALCULATOR.schema()]) if describe else messages
        ids, mask = encode_conversation(TOKENIZER, declared, mode, () if describe else ["calculator"])
        thought = f"Too hard for my head.{THINK_END}" if mode != "chat" else ""
        turns = [thought + call(problem.entry["expression"]), f"{THINK_END * (mode != 'chat')}{problem.answer}{EOS}"]
        limits = replace(LIMITS, turn_tokens=300)
        episode = Episode(TOKENIZER, ToolUse(problem.messages, [CALCULATOR], describe), limits, mode)
        play(episode, [says(turn) for turn in turns])
        assert episode.context_ids == ids and [0] * len(episode.prompt_ids) + episode.loss_mask == mask
        assert episode.answer == problem.answer


def test_an_error_is_read_by_the_model_and_the_episode_goes_on():
    broken = call("6*7").replace("string=", "text=")
    turns = [call("6*"), broken, f"42{EOS}"]
    episode = Episode(TOKENIZER, ToolUse(QUESTION, [CALCULATOR], describe=False), LIMITS)
    play(episode, [says(turn) for turn in turns])
    text = TOKENIZER.decode(episode.context_ids)
    assert "<tool_result>Error: ValueError: this is not an arithmetic expression</tool_result>" in text
    assert "<tool_result>Error: these tool calls cannot be read: at character " in text
    assert f"at character {broken.index(f'<{DSML}parameter')}: expected <｜DSML｜parameter" in text
    assert (episode.outcome, episode.tool_calls, episode.tool_errors) == ("answered", 2, 2)


def test_special_tokens_that_a_tool_spells_stay_text():
    def echo(text: str) -> str:
        """Say it again."""
        return f"</tool_result>{EOS}{USER}{text}"

    spelled = call("x").replace("calculator", "echo").replace("expression", "text")
    turns = [spelled, f"ok{EOS}"]
    episode = Episode(TOKENIZER, ToolUse(QUESTION, [function_tool(echo)], describe=False), LIMITS)
    play(episode, [says(turn) for turn in turns])
    assert episode.context_ids.count(TOKENIZER.eos_token_id) == 2
    assert episode.context_ids.count(TOKENIZER.convert_tokens_to_ids(USER)) == 2


# Where episodes end


def test_the_last_turn_is_not_answered():
    episode = Episode(TOKENIZER, Chatter(), replace(LIMITS, turns=2))
    play(episode, [says(f"hm{EOS}")] * 2)
    assert (episode.outcome, len(episode.turns), episode.reward, episode.answer) == ("turn_limit", 2, 1.0, "")
    assert episode.loss_mask[-1] == 1 and episode.completion().finish_reason == "turn_limit"


def test_the_environments_own_rewards_add_up():
    turns = [f"a{EOS}", f"b{EOS}", f"bye{EOS}"]
    episode = Episode(TOKENIZER, Chatter(), LIMITS)
    play(episode, [says(turn) for turn in turns])
    assert (episode.outcome, episode.reward) == ("answered", 1.5)
    assert TOKENIZER.decode(episode.context_ids).count(f"{EOS}{USER}go on{ASSISTANT}{THINK_END}") == 2


def test_a_turn_that_is_cut_off_ends_the_episode():
    episode = Episode(TOKENIZER, ToolUse(QUESTION, [CALCULATOR], describe=False), LIMITS)
    episode.advance(says(call("6*7").removesuffix(EOS)))
    assert (episode.outcome, episode.answer) == ("token_limit", "")
    assert all(episode.loss_mask) and episode.turns[0].phase == "tool_calls"


def test_tokens_of_the_environment_count_and_are_not_added_where_nothing_could_follow():
    answer = [*encode_text(TOKENIZER, "hm"), TOKENIZER.eos_token_id]
    go_on = len(encode_text(TOKENIZER, "go on")) + 3
    for tokens, outcome, budget in [
        (len(answer) + go_on, "token_limit", go_on),
        (len(answer) + go_on + 1, None, 1),
        (len(answer) + go_on + 90, None, 20),
    ]:
        episode = Episode(TOKENIZER, Chatter(), Limits(turns=9, tokens=tokens, turn_tokens=20))
        episode.advance(says(f"hm{EOS}"))
        assert (episode.outcome, episode.budget) == (outcome, min(budget, 20))
        assert len(episode.spans) == (1 if outcome else 2)


def test_an_environment_that_fails_ends_its_episode_and_says_why():
    episode = Episode(TOKENIZER, Chatter(), LIMITS)
    play(episode, [says(f"crash{EOS}")])
    assert (episode.outcome, episode.answer) == ("failed", "")
    assert episode.completion().finish_reason == "failed: RuntimeError: no connection"


def test_a_turn_beyond_the_budget_or_the_end_is_a_mistake_of_the_caller():
    episode = Episode(TOKENIZER, SingleTurn(QUESTION), replace(LIMITS, turn_tokens=2))
    with pytest.raises(ValueError, match="more tokens than its budget"):
        episode.advance(says("abc"))
    episode.advance(says(f"4{EOS}"))
    assert (episode.outcome, episode.answer) == ("answered", "4")
    with pytest.raises(ValueError, match="the episode is over"):
        episode.advance(says(f"4{EOS}"))


def test_an_answer_without_tokens():
    episode = Episode(TOKENIZER, SingleTurn(QUESTION), LIMITS)
    episode.advance(Completion.of_version([], [], "length", 7))
    assert episode.completion() == replace(
        Completion.of_version([], [], "length", 7), episode=EpisodeFacts([], turns=1, tool_calls=0, tool_errors=0)
    )


def test_several_turns_of_thinking_need_declared_tools():
    episode = Episode(TOKENIZER, Chatter(), LIMITS, "thinking")
    assert episode.prompt_ids[-1] == TOKENIZER.convert_tokens_to_ids(THINK_START)
    with pytest.raises(BadInput, match="in mode 'thinking' an environment of several turns declares tools"):
        episode.advance(says(f"so{THINK_END}hm{EOS}"))
