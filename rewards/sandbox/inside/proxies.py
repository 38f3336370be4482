"""The program as its examiner sees it: functions that ask, and plain data that they get.

Only a name that tests write like a class (`Stack`) gives an object of the program's; functions and methods must give
plain data, iterators of it, or functions that give it. So no object of the program's making meets a comparison with
what a test expects.
"""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator
from typing import IO, Any

from .codec import LONGEST_MESSAGE, NotPlain, dump, unpack


class ProgramFault(BaseException):
    """The program ended, or gave what it must not give. No `Exception`: tests that expect one must not pass by this."""


class Program:
    """The other end: the program's jail."""

    def __init__(self, requests: IO[bytes], replies: IO[bytes]) -> None:
        self.requests, self.replies = requests, replies
        self.exceptions: dict[str, type[Exception]] = {}

    def ask(self, operation: str, *arguments: Any, objects: bool = False) -> Any:
        """Have the program do something.

        Args:
            objects: whether it may give an object of its own.

        Raises:
            ProgramFault, or what the program raises.
        """
        packed = [json.loads(dump(one, _number_of)) for one in arguments]
        try:
            self.requests.write(json.dumps([operation, *packed]).encode() + b"\n")
            self.requests.flush()
        except OSError:
            raise ProgramFault("the program ended") from None
        return self.reply(objects)

    def reply(self, objects: bool = False) -> Any:
        """The program's next message: the result of what it was asked. The first one is that of loading it."""
        line = self.replies.readline(LONGEST_MESSAGE)
        if not line.endswith(b"\n"):
            raise ProgramFault("the program ended, or gave more than can be taken")
        try:
            kind, result, *rest = unpack(json.loads(line), lambda *tagged: self._stand_in(objects, *tagged))
        except Exception as error:  # whatever is wrong with bytes that anybody may have written
            raise ProgramFault(f"the program gave no plain data: {error}") from None
        if kind == "returned":
            return result
        if kind == "raised" and isinstance(result, list) and result and len(rest) == 1:
            raise self._exception([str(one) for one in result])(str(rest[0]))
        raise ProgramFault(f"the program gave no plain data: {result!r}"[:300])

    def _exception(self, kinds: list[str]) -> type[Exception]:
        """The class that stands for the program's: a built-in one by its name, else one made here, by its bases."""
        if kinds[0] in self.exceptions:
            return self.exceptions[kinds[0]]
        for name in kinds:
            known = getattr(builtins, name, None)
            if isinstance(known, type) and issubclass(known, Exception):
                found = known if name == kinds[0] else type(kinds[0], (known,), {})
                return self.exceptions.setdefault(kinds[0], found)
        return RuntimeError  # SystemExit and the like end nobody but the program

    def _stand_in(self, objects: bool, tag: str, number: int, *kinds: str) -> Any:
        if tag == "iterator":
            return _Iterator(self, number)
        if tag == "exception" and objects:
            return self._exception(list(kinds))
        if tag == "class" and objects:
            return _Class(self, number)
        if tag in ("object", "callable") and objects:
            return _Object(self, number)
        if tag == "callable":
            return _Function(self, number)
        raise NotPlain(f"{kinds[0] if kinds else tag} is no plain data")


def _number_of(value: Any) -> Any:
    if isinstance(value, _Remote):
        return ["object", object.__getattribute__(value, "_number")]
    raise NotPlain(f"a test gave the program a {type(value).__name__}, which is no plain data")


class _Remote:
    """Something in the program's process."""

    def __init__(self, program: Program, number: int) -> None:
        self._program, self._number = program, number


class _Function(_Remote):
    _gives_objects = False

    def __call__(self, *positional: Any, **named: Any) -> Any:
        answer = self._program.ask("call", self, list(positional), named, objects=self._gives_objects)
        if not (isinstance(answer, list) and len(answer) == 2 and isinstance(answer[1], list)):
            raise ProgramFault("the program does not answer a call")
        for mine, theirs in zip(positional, answer[1], strict=False):
            _change(mine, theirs)
        return answer[0]


def _change(mine: Any, theirs: Any) -> None:
    """Let a test see what the program did to its argument."""
    if type(theirs) is not type(mine):
        return
    if isinstance(mine, (list, bytearray)):
        mine[:] = theirs
    elif isinstance(mine, (dict, set)):
        mine.clear()
        mine.update(theirs)


class _Class(_Function):
    _gives_objects = True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._program.ask("get", self, name)


class _Iterator(_Remote):
    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._program.ask("next", self)


class _Object(_Function):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._program.ask("get", self, name)

    def __len__(self) -> int:
        return self._program.ask("length", self)

    def __getitem__(self, key: Any) -> Any:
        return self._program.ask("item", self, key)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._program.ask("iterate", self))

    def __bool__(self) -> bool:
        return self._program.ask("truth", self) is True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Object) and self._program.ask("equal", self, other) is True

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return str(self._program.ask("text", self))
