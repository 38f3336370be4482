"""Runs the tests of an answer against its program in the other jail and reports the verdict."""

from __future__ import annotations

import ast
import builtins
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from .proxies import Program, ProgramFault

REQUESTS, REPLIES, VERDICT = 3, 4, 5
MODULE = "solution"


def main(tests_path: str, entry_point: str) -> None:
    """Examine: one JSON line for the number of tests, one for each test as soon as it is over."""
    verdict = os.fdopen(VERDICT, "w", buffering=1)
    program = Program(os.fdopen(REQUESTS, "wb"), os.fdopen(REPLIES, "rb"))
    with open(tests_path, encoding="utf-8") as file:
        tree = ast.parse(file.read(), tests_path)
    examination = Examination(tree, program, entry_point)
    print(json.dumps({"tests": examination.count()}), file=verdict)
    for name, problem in examination.results():
        print(json.dumps({"test": name, "problem": problem}), file=verdict)


class Examination:
    """Tests in the usual forms: top-level `assert`s, `test_...` functions, `unittest` classes, `check(candidate)`.

    Other top-level statements are preparation; when one fails, so does every later test.

    Args:
        entry_point: the function that `check` is given; empty if there is none.
    """

    def __init__(self, tree: ast.Module, program: Program, entry_point: str) -> None:
        self.tree, self.program, self.entry_point = tree, program, entry_point
        functions = [one for one in tree.body if isinstance(one, ast.FunctionDef)]
        self.functions = [one.name for one in functions if one.name.startswith("test") and not one.args.args]
        self.checks = [one.name for one in functions if one.name == "check" and entry_point]
        self.names: dict[str, Any] = {"__name__": "tests"}

    def count(self) -> int:
        """How many tests there are; known before the program has said a word."""
        asserts = sum(isinstance(one, ast.Assert) for one in self.tree.body)
        methods = sum(
            isinstance(one, ast.FunctionDef) and one.name.startswith("test")
            for defined in self.tree.body
            if isinstance(defined, ast.ClassDef)
            for one in defined.body
        )
        return asserts + len(self.functions) + methods + len(self.checks)

    def results(self) -> Iterator[tuple[str, str | None]]:
        """Name and problem of each test; None: passed."""
        problem = _problem_of(self._prepare)
        for statement in self.tree.body:
            code = compile(ast.Module([statement], []), "tests", "exec")
            if isinstance(statement, ast.Assert):
                yield f"line {statement.lineno}", problem or _problem_of(partial(exec, code, self.names))
            elif problem is None:
                problem = _problem_of(partial(exec, code, self.names))
        for name in self.functions:
            yield name, problem or _problem_of(partial(self._call, name))
        for name in self.checks:
            yield name, problem or _problem_of(partial(self._call, name, self.entry_point))
        if problem is None:
            yield from self._unit_tests()

    def _call(self, name: str, *arguments: str) -> None:
        self.names[name](*(self.names[one] for one in arguments))

    def _prepare(self) -> None:
        """Wait for the program to load, and give the tests the names that they use and do not make."""
        self.program.reply()
        sys.modules[MODULE] = self._module()
        made, used = _names(self.tree)
        for name in sorted((used | {self.entry_point}) - made - set(dir(builtins)) - {""}):
            try:
                self.names[name] = self._look(name)
            except (AttributeError, ProgramFault):  # a module, for one; whoever needs it finds out
                continue

    def _module(self) -> types.ModuleType:
        """What `from solution import ...` imports from. `*` brings no name that Python or the tests have already."""
        module = types.ModuleType(MODULE)
        made, _ = _names(self.tree)
        listed = self.program.ask("names", None)
        names = [one for one in listed if isinstance(one, str) and one not in made and not hasattr(builtins, one)]
        module.__dict__["__all__"] = [one for one in names if self._has(one)]
        module.__dict__["__getattr__"] = self._look
        return module

    def _has(self, name: str) -> bool:
        try:
            self._look(name)
        except (AttributeError, ProgramFault):
            return False
        return True

    def _look(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.program.ask("look", name, objects=name[:1].isupper())

    def _unit_tests(self) -> Iterator[tuple[str, str | None]]:
        if "unittest" not in sys.modules:  # importing it takes longer than most tests
            return
        import unittest

        cases = [one for one in self.names.values() if isinstance(one, type) and issubclass(one, unittest.TestCase)]
        for case in cases:
            for test in unittest.defaultTestLoader.loadTestsFromTestCase(case):
                result = unittest.TestResult()
                test.run(result)
                problems = [*result.failures, *result.errors]
                skipped = result.skipped or result.expectedFailures or result.unexpectedSuccesses
                problem = "did not run" if skipped or not result.testsRun else None
                yield str(test), problems[0][1].strip().splitlines()[-1][:500] if problems else problem


def _problem_of(action: Callable[[], Any]) -> str | None:
    try:
        action()
    except (Exception, ProgramFault) as error:
        return f"{type(error).__name__}: {error}"[:500]
    return None


def _names(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Names that the tests make at their top level, and names that they use anywhere."""
    made: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            made.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            made |= {(one.asname or one.name).partition(".")[0] for one in node.names}
        else:
            made |= {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
    used = {one.id for one in ast.walk(tree) if isinstance(one, ast.Name)}
    return made, used


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
