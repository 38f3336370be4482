"""Verdicts on programs: forms of tests, kinds of values, and what counts as passed."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import sandbox
from rewards.sandbox.inside.codec import NotPlain, dump, pack, unpack

PROGRAM = """
import functools
from collections import Counter, OrderedDict, defaultdict, namedtuple
from decimal import Decimal
from fractions import Fraction

LIMIT = 7
Point = namedtuple("Point", "x y")


class Refused(ValueError):
    pass


class Stack:
    kind = "stack"

    def __init__(self, items=()):
        self.items = list(items)

    def push(self, item):
        self.items.append(item)
        return self

    def pop(self):
        return self.items.pop()

    @property
    def top(self):
        return self.items[-1]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def __iter__(self):
        return iter(self.items)

    def __eq__(self, other):
        return self.items == other.items

    def __repr__(self):
        return f"Stack({self.items})"


def double(x):
    return 2 * x


def refuse(x):
    raise Refused(f"not {x}")


def fail(name):
    raise {"key": KeyError, "zero": ZeroDivisionError, "stop": StopIteration, "system": SystemExit}[name]("why")


def count_to(n):
    yield from range(1, n + 1)


def forever():
    while True:
        yield 1


def sort_in_place(items):
    items.sort()


def adder(n):
    return lambda x: x + n


@functools.lru_cache
def cached(n):
    return n


def values():
    return Counter("aab"), OrderedDict(a=1), defaultdict(int, b=2), Point(1, 2), Fraction(1, 3), Decimal("0.10")


def a_stack():
    return Stack()
"""


def examine(tests: str, program: str = PROGRAM, entry_point: str = "") -> sandbox.Verdict:
    return sandbox.examine(program, tests, entry_point, sandbox.Limits(wall_seconds=20, cpu_seconds=5))


def test_every_form_of_tests_is_run() -> None:
    verdict = examine(
        """
import unittest
from solution import double as twice
import solution
from solution import *

assert double(2) == 4
assert twice(2) == 4, "renamed"
assert solution.double(3) == 6 and LIMIT == 7

def helper():
    return double(4)

def test_function():
    assert helper() == 8

class Tests(unittest.TestCase):
    def setUp(self):
        self.value = double(5)
    def test_method(self):
        self.assertEqual(self.value, 10)

def check(candidate):
    assert candidate(6) == 12
""",
        entry_point="double",
    )
    assert (verdict.passed, verdict.tests, verdict.problems) == (6, 6, ())
    assert verdict.share == 1


def test_every_kind_of_wrong_is_counted_and_named() -> None:
    verdict = examine(
        """
import unittest
assert double(2) == 5
assert missing(1) == 1
assert double(2) == 4
def test_function():
    raise ValueError("bad")
class Tests(unittest.TestCase):
    def test_fails(self):
        self.assertEqual(double(1), 3)
    def test_errs(self):
        refuse(1)
    @unittest.skip("later")
    def test_skipped(self):
        pass
"""
    )
    assert (verdict.passed, verdict.tests) == (1, 7)
    assert verdict.problems[:3] == (
        "line 3: AssertionError: ",
        "line 4: NameError: name 'missing' is not defined",
        "test_function: ValueError: bad",
    )
    assert {problem.partition(" ")[0] for problem in verdict.problems[3:]} == {
        "test_fails",
        "test_errs",
        "test_skipped",
    }


def test_exceptions_arrive_by_their_names() -> None:
    verdict = examine(
        """
import unittest
class Tests(unittest.TestCase):
    def test_own(self):
        with self.assertRaisesRegex(Refused, "^not 3$"):
            refuse(3)
    def test_base(self):
        with self.assertRaises(ValueError):
            refuse(3)
    def test_builtin(self):
        with self.assertRaises(KeyError):
            fail("key")
        with self.assertRaises(ZeroDivisionError):
            fail("zero")
    def test_not_another(self):
        with self.assertRaises(AssertionError):
            with self.assertRaises(TypeError):
                pass
        with self.assertRaises(KeyError):
            try:
                fail("key")
            except ValueError:
                pass
    def test_that_would_end_an_interpreter(self):
        with self.assertRaises(RuntimeError):
            fail("system")
"""
    )
    assert verdict.problems == () and verdict.tests == 5


def test_objects_of_classes_can_be_used() -> None:
    verdict = examine(
        """
def test_stack():
    stack = Stack([1, {"a": (2, 3)}])
    assert len(stack) == 2 and stack.top == {"a": (2, 3)} and stack[0] == 1
    assert list(stack) == [1, {"a": (2, 3)}]
    assert stack.pop() == {"a": (2, 3)}
    assert Stack([1, 2]) == Stack([1, 2]) != Stack([3])
    assert Stack.kind == "stack" and Stack() != [] and not Stack() and Stack([0])
    assert repr(Stack([1])) == "Stack([1])"
def test_methods_give_plain_data():
    Stack().push(1)
"""
    )
    (problem,) = verdict.problems
    assert problem.startswith("test_methods_give_plain_data: ProgramFault") and "Stack is no plain data" in problem


def test_what_a_program_returns_is_plain_data_or_a_problem() -> None:
    verdict = examine(
        """
def test_values():
    from decimal import Decimal
    from fractions import Fraction
    assert values() == ({"a": 2, "b": 1}, {"a": 1}, {"b": 2}, (1, 2), Fraction(1, 3), Decimal("0.1"))
def test_iterators():
    assert list(count_to(3)) == [1, 2, 3]
    numbers = forever()
    assert [next(numbers), next(numbers)] == [1, 1]
    assert sum(count_to(100)) == 5050
def test_functions():
    assert adder(2)(3) == 5 and cached(4) == 4
def test_big_numbers():
    assert double(10**400) == 2 * 10**400 and double(2**70) == 2**71 and double(-(2**53)) == -(2**54)
    assert double(0.1) == 0.2 and double(float("inf")) == float("inf") and double(1j) == 2j
    assert type(double(2)) is int and type(double(2.0)) is float and type(double(True)) is int
def test_text():
    assert double("é\\ud800\\n") == "é\\ud800\\n" * 2 and double(b"\\xff") == b"\\xff\\xff"
def test_an_object_from_a_function():
    a_stack()
"""
    )
    (problem,) = verdict.problems
    assert (
        problem
        == "test_an_object_from_a_function: ProgramFault: the program gave no plain data: Stack is no plain data"
    )


def test_changes_in_place_reach_the_argument() -> None:
    assert examine("items = [3, 1, 2]\nassert sort_in_place(items) is None\nassert items == [1, 2, 3]").share == 1


def test_a_test_that_gives_the_program_a_function_fails() -> None:
    assert "no plain data" in examine("assert double(lambda: 1) == 1").problems[0]


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("def double(x)", "SyntaxError"),
        ("1/0", "ZeroDivisionError"),
        ("import numpy", "ModuleNotFoundError"),
        ("", "NameError"),
        ("double = 3", "TypeError"),
        ("import os\nos._exit(0)", "the program ended"),
        ("while True: pass", "the program ended"),
        ("def double(x): return double(x)", "RecursionError"),
        ("class double:\n    def __new__(cls, x): return 4", "no plain data"),
    ],
)
def test_a_broken_program_passes_nothing(program: str, problem: str) -> None:
    limits = sandbox.Limits(wall_seconds=5, cpu_seconds=1)
    verdict = sandbox.examine(program, "assert double(2) == 4\nassert double(3) == 6", limits=limits)
    assert (verdict.passed, verdict.tests) == (0, 2)
    assert problem in verdict.problems[0] or verdict.problems[0].startswith("line 1: NameError")


def test_preparation_that_fails_fails_the_rest() -> None:
    verdict = examine("assert double(1) == 2\nimport no_such_module\nassert double(1) == 2\ndef test_x():\n    pass")
    assert (verdict.passed, verdict.tests) == (1, 3)


@pytest.mark.parametrize(
    ("tests", "complaint"),
    [("x = (", "cannot be run: .*never closed"), ("", "there are no tests"), ("x = 1", "there are no tests")],
)
def test_tests_that_are_none_are_the_data_sets_fault(tests: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){complaint}"):
        examine(tests)


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("1 2\\n3", "1 2\n3\n", True),
        ("1 2  \\n3\\n\\n", "1 2\n3", True),
        ("1  2", "1 2", False),
        ("", "", True),
        ("", "x", False),
        ("X", "x", False),
    ],
)
def test_output_is_compared_without_white_space_at_the_ends(printed: str, expected: str, same: bool) -> None:
    verdict = sandbox.compare(f"print('{printed}')", [sandbox.Case("", expected)])
    assert verdict.share == same


def test_cases_are_run_one_by_one_until_one_fails() -> None:
    cases = [sandbox.Case(f"{number}\n", str(2 * number)) for number in (1, 2, 3)]
    program = "n = int(input())\nprint(2 * n if n != 2 else 0)"
    stopped, whole = sandbox.compare(program, cases), sandbox.compare(program, cases, stop_early=False)
    assert (stopped.passed, stopped.tests, stopped.problems) == (1, 3, ("case 1: printed something else",))
    assert (whole.passed, whole.tests) == (2, 3)


def test_the_right_output_does_not_make_up_for_a_bad_end() -> None:
    assert sandbox.compare("print(1)\nraise SystemExit(1)", [sandbox.Case("", "1")]).problems == ("case 0: exit 1",)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.fractions()
    | st.decimals(allow_nan=False) | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner)
    | st.sets(st.integers()) | st.frozensets(st.text()),
    max_leaves=12,
)  # fmt: skip


def types_in(value) -> object:
    """The value with every scalar replaced by its type and text."""
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(map(types_in, value))
    if isinstance(value, dict):
        return type(value), [(types_in(key), types_in(one)) for key, one in value.items()]
    return type(value), [types_in(one) for one in value] if isinstance(value, (list, tuple)) else repr(value)


@settings(max_examples=200, deadline=None)
@given(value=plain)
def test_plain_data_survives_the_journey_with_its_types(value) -> None:
    again = unpack(json.loads(dump(value)))
    assert again == value and types_in(again) == types_in(value)


def test_not_a_number_survives_as_well() -> None:
    assert math.isnan(unpack(pack(math.nan)))
    assert (unpack(pack(Fraction(1, 3))), unpack(pack(Decimal("1e5")))) == (Fraction(1, 3), Decimal("1e5"))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["list", "dict", "int", "set"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=15,
)


@settings(max_examples=300, deadline=None)
@given(value=json_values)
def test_whatever_is_read_gives_plain_data_or_an_error_and_nothing_else(value) -> None:
    kinds = (
        type(None),
        bool,
        int,
        float,
        str,
        list,
        tuple,
        dict,
        set,
        frozenset,
        bytes,
        bytearray,
        complex,
        Fraction,
        Decimal,
    )
    try:
        read = unpack(value)
    except (NotPlain, TypeError, ValueError, ArithmeticError):
        return
    assert type(read) in kinds
