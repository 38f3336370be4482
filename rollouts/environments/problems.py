"""Environments of a domain's problems: one answer, or tools on the way to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from posttrain.data.v4 import Message, ParsedTurn, ToolCall, with_tools
from rollouts.environments.protocol import Observation
from rollouts.environments.tools import Tool, ToolError


class SingleTurn:
    """A problem with one answer, as reasoning-gym's are: over after the first turn, judged by the domain's rewards.

    Args:
        messages: The problem's (`Problem.messages`).
    """

    def __init__(self, messages: Sequence[Message]) -> None:
        self._messages = list(messages)

    def reset(self) -> list[Message]:
        """The problem."""
        return self._messages

    def step(self, turn: ParsedTurn) -> Observation:
        """Over."""
        return Observation()


class ToolUse:
    """A problem that may be solved with tools: over with the first turn that calls none.

    Calls that cannot be read or carried out come back to the model as results that begin with `Error:`; of a turn that
    cannot be read, no call is carried out.

    Args:
        messages: The problem's.
        describe: Declare the tools to the model. V4's text for that is about 300 tokens of its own vocabulary and 1,100
            characters; a small model that has learned the calls from examples can do without.
        longest_result: Characters of a result; what is beyond is cut off, and the model is told so.
    """

    def __init__(
        self,
        messages: Sequence[Message],
        tools: Iterable[Tool],
        describe: bool = True,
        longest_result: int = 4000,
    ) -> None:
        self._messages = list(messages)
        self._tools = {tool.name: tool for tool in tools}
        self._describe = describe
        self._longest = longest_result

    def reset(self) -> list[Message]:
        """The problem, with the tools declared in its system message."""
        if not self._describe:
            return self._messages
        return with_tools(self._messages, [tool.schema() for tool in self._tools.values()])

    def step(self, turn: ParsedTurn) -> Observation:
        """The results of the turn's calls."""
        if not turn.calls_tools:
            return Observation()
        if turn.errors or not turn.tool_calls:
            problems = "; ".join(map(str, turn.errors))
            results = [(f"Error: these tool calls cannot be read: {problems}", False)]
        else:
            results = [self._result(call) for call in turn.tool_calls]
        messages = tuple({"role": "tool", "content": self._cut(text)} for text, _ in results)
        return Observation(messages, tool_calls=len(results), tool_errors=sum(not good for _, good in results))

    def _result(self, call: ToolCall) -> tuple[str, bool]:
        """The text for the model, and whether the call was carried out."""
        try:
            tool = self._tools.get(call.name)
            if tool is None:
                raise ToolError(f"there is no tool {call.name!r}; there are {', '.join(self._tools)}")
            return tool.run(call), True
        except ToolError as error:
            return f"Error: {error}", False

    def _cut(self, result: str) -> str:
        # What a tool returns may hold anything; half of a surrogate pair could not be written as tokens.
        result = result.encode("utf-8", "replace").decode()
        if len(result) <= self._longest:
            return result
        return f"{result[: self._longest]}... (cut off: {len(result)} characters)"
