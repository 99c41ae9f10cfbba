"""Programs against tests: what counts as passing, and what is the tests' own fault."""

import gzip
import json
from pathlib import Path

import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.rewards import CodeReward
from rlhf_lightning.rewards.code import as_tests, program_in
from rlhf_lightning.rewards.inside.plain import decode, encode
from rlhf_lightning.rewards.reward import Samples, checked_scores
from rlhf_lightning.rewards.sandbox import Limits, Sandbox
from rlhf_lightning.rewards.verdicts import passed_tests

LIMITS = Limits(seconds=20, cpu_seconds=10, memory_mb=512)
HUMANEVAL = Path(__file__).parents[4] / "shared" / "data" / "humaneval" / "HumanEval.jsonl.gz"


@pytest.fixture(scope="module", autouse=True)
def isolation():
    """The best that is to be had: what is tested here is the same in any."""
    try:
        return Sandbox().tool
    except UserError:
        return "none"


def scores(isolation, completions, tests, partial=False, columns=None, **names):
    reward = CodeReward(partial=partial, isolation=isolation, limits=LIMITS, workers=2, **names)
    n = len(completions)
    rows = {"tests": [tests] * n, **{k: [v] * n for k, v in (columns or {}).items()}}
    return checked_scores(reward, Samples(["p"] * n, completions, [[1]] * n, [False] * n, rows)).tolist()


def fenced(code):
    return f"Let me think.\n```python\n{code}\n```\nDone."


SQUARE, CUBE, HALF = (
    "def f(x):\n    return x ** 2",
    "def f(x):\n    return x ** 3",
    "def f(x):\n    return x ** 2 if x < 2 else 0",
)


def test_every_test_or_the_share_of_them(isolation):
    tests = ["assert f(1) == 1", "assert f(3) == 9", "assert f(-2) == 4", "assert f(2) > 3"]
    programs = [fenced(SQUARE), SQUARE, fenced(CUBE), fenced(HALF), "no program"]
    assert scores(isolation, programs, tests) == [1.0, 1.0, 0.0, 0.0, 0.0]
    # x ** 3: f(1) and f(2) > 3; the half: f(1) and, negative, f(-2).
    assert scores(isolation, programs, tests, partial=True) == [1.0, 1.0, 0.5, 0.5, 0.0]


def test_humaneval_goes_on_from_its_prompt_and_checks_the_entry_point(isolation):
    prompt = 'import math\n\ndef area(r: float) -> float:\n    """Of a circle."""\n'
    test = "def check(candidate):\n    assert math.isclose(candidate(2), 4 * math.pi)\n    assert candidate(0) == 0\n"
    columns = {"prompt_code": prompt, "entry_point": "area"}
    given = {"prefix": "prompt_code", "entry_point": "entry_point", "columns": columns}
    assert scores(isolation, ["    return math.pi * r * r", "    return 3 * r * r"], test, **given) == [1.0, 0.0]
    # The module math that the tests name is Python's, whatever the program calls so.
    liar = "    return 3 * r * r\n\nclass math:\n    pi = 3\n    isclose = lambda *_: True\n"
    assert scores(isolation, [liar], test, **given) == [0.0]


def test_mbpp_has_a_list_of_tests_and_its_own_imports(isolation):
    tests = ["assert set(f([1, 2, 2])) == {1, 2}", "assert math.isclose(sum(f([0.1] * 3)), 0.1)"]
    assert scores(
        isolation, ["def f(x):\n    return tuple(set(x))"], tests, setup="s", columns={"s": "import math"}
    ) == [1.0]


EVERYTHING = """
import collections, math
class Stack:
    def __init__(self, items=()):
        self.items = list(items)
    def push(self, x):
        self.items.append(x)
        return self
    def size(self):
        return len(self.items)
def plain():
    return [None, True, 2 ** 70, -1.5, float("inf"), "ü\\ud800", b"x", (1, {2}, frozenset({3})), {(1, 2): [3]}, 1j]
def count():
    yield from range(3)
def naturals():
    yield from __import__("itertools").count()
def views():
    return range(2), {1: 2}.values(), collections.deque([3])
def sort(items):
    items.sort()
def add(a, *, b):
    return a + b
def change(coins):
    return len(coins)
def fail(kind):
    raise {"value": ValueError, "unicode": UnicodeError, "own": type("Own", (KeyError,), {})}[kind]("why")
def counted(text):
    return collections.Counter(text)
def first(stack):
    return stack.items[0]
LIMIT = 10
"""
OVER = {
    "plain data": "assert plain() == [None, True, 2 ** 70, -1.5, float('inf'), 'ü\\ud800', b'x', (1, {2}, frozenset({3})), "
    "{(1, 2): [3]}, 1j] and type(plain()[7]) is tuple",
    "generators": "assert list(count()) == [0, 1, 2] and max(count()) == 2 and next(naturals()) == 0",
    "generators without end": "import itertools\nassert list(itertools.islice(naturals(), 3)) == [0, 1, 2]",
    "other lists": "assert [list(x) for x in views()] == [[0, 1], [2], [3]]",
    "work in place": "a = [3, 1, 2]\nassert sort(a) is None\nassert a == [1, 2, 3]",
    "named arguments": "assert add(1, b=2) == 3",
    "errors": "try:\n    fail('value')\nexcept ValueError as error:\n    assert str(error) == 'why'\nelse:\n    assert False",
    "errors of its own": "try:\n    fail('own')\nexcept KeyError:\n    pass\nelse:\n    assert False",
    "subclasses": "assert counted('aab') == {'a': 2, 'b': 1}",
    "objects": "s = Stack([1])\nassert s.push(2).push(3).size() == 3 and s.items == [1, 2, 3]",
    "objects handed back": "assert first(Stack([7])) == 7",
    "constants": "assert LIMIT == 10",
    "the module": "from solution import add, change\nassert change([1]) == 1\nimport solution\n"
    "assert solution.add(1, b=1) == add(0, b=2) == 2",
    "test functions": "def test_one():\n    assert add(1, b=1) == 2\ndef test_two():\n    assert LIMIT == 10",
}
WRONG = {
    "test functions": "def test_one():\n    pass\ndef test_two():\n    assert LIMIT == 11",
    "errors": "fail('value')",
    "no such name": "assert missing(1) == 1",
    "no such import": "from solution import missing",
    "in place": "a = [3, 1, 2]\nsort(a)\nassert a == [3, 1, 2]",
    "objects": "assert Stack([1]) == Stack([1])",
    "a generator to its end": "sum(naturals())",
}


def test_what_goes_over_between_tests_and_program(isolation):
    verdicts = dict(zip(OVER, per_test(isolation, OVER), strict=True))
    assert verdicts == dict.fromkeys(OVER, True)
    assert per_test(isolation, WRONG) == [False] * len(WRONG)


def test_a_test_without_a_verdict_is_not_passed(isolation):
    source = "import time\ndef f(x):\n    time.sleep(1e6 * (x == 2))\n    return x"
    tests = [f"assert f({x}) == {x}" for x in (1, 2, 3)]
    assert passed_tests(Sandbox(isolation, Limits(seconds=8)), source, tests) == [True, False, False]


def test_what_a_program_calls_equal_is_not(isolation):
    source = "class Any:\n    def __eq__(self, other):\n        return True\n\ndef f(x):\n    return Any()"
    tests = ["assert f(1) == 1", "assert 1 == f(1)", "assert f(1) in [1]", "assert not f(1) != 1"]
    assert passed_tests(Sandbox(isolation, LIMITS), source, tests) == [False] * 4


TWO_FACED = """
class Sorted:
    def __init__(self, items):
        self.items = items
    def __len__(self):
        return len(self.items)
    def __getitem__(self, i):
        return i
    def __iter__(self):
        return iter(self.items)
def f(items):
    return Sorted(items)
def g(items):
    raise StopIteration
"""


def test_what_looks_different_each_time_and_what_ends_a_loop_pass_nothing(isolation):
    items = "items = [3, 1, 2]\nr = {}(items)\n"
    rising = "assert all(r[i] <= r[i + 1] for i in range(len(r) - 1)) and sorted(r) == sorted(items)"
    tests = [items.format(name) + rising for name in ("sorted", "f")]
    tests += [f"assert all(map(lambda x: {name}([x]) == [x], [1, 2]))" for name in ("sorted", "g")]
    assert passed_tests(Sandbox(isolation, LIMITS), TWO_FACED, tests) == [True, False, True, False]


def per_test(isolation, tests):
    return passed_tests(Sandbox(isolation, LIMITS), EVERYTHING, list(tests.values()))


@pytest.mark.parametrize(
    ("test", "complaint"),
    [
        ("assert f(1 == 1", r"SyntaxError.*the test begins 'assert f\(1 == 1'"),
        ("import no_such_package\nassert f(1) == 1", "No module named 'no_such_package'"),
        ("assert f(lambda: 1) == 1", "hand over a function"),
        ("class A: pass\nf(A())", "hand over a A"),
    ],
)
def test_what_no_program_could_pass_is_an_error(isolation, test, complaint):
    with pytest.raises(UserError, match=f"a test is at fault.*{complaint}"):
        scores(isolation, [SQUARE], [test])


def test_inputs_and_outputs(isolation):
    tests = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7"]}
    add = "a, b = map(int, input().split())\nprint(a + b, ' ')"
    programs = [
        fenced(add),
        "print(3)",
        add + "\nraise ValueError",
        add + "\nprint()\n",
        "import os\nprint(3)\nos._exit(0)",
    ]
    assert scores(isolation, programs, json.dumps(tests)) == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert scores(isolation, programs[:3], tests, partial=True) == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    "cell",
    [
        None,
        "",
        [],
        ["assert 1", " "],
        [1],
        {},
        {"inputs": ["1"], "outputs": []},
        '{"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}',
    ],
)
def test_cells_that_hold_no_tests_are_refused(cell):
    with pytest.raises(UserError, match="the column 'tests' holds"):
        as_tests(cell, "tests")


def test_a_column_that_is_not_there_is_named(isolation):
    with pytest.raises(
        UserError, match="CodeReward needs the column 'checks', which the rows have not; they have a, b"
    ):
        CodeReward("checks", isolation=isolation).score(Samples(["p"], ["c"], [[1]], [False], {"a": [1], "b": [2]}))


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("x = 1", "x = 1"),
        ("a\n```python\nx = 1\n```\nb", "x = 1\n"),
        ("```py\nx = 1\n```\n```\nx = 2\n```", "x = 2\n"),
        ("```python\nx = 1", ""),
        ("```json\n{}\n```", ""),
    ],
)
def test_the_program_in_a_completion(completion, program):
    assert program_in(completion) == program


def test_plain_data_comes_back_as_it_went():
    value = [
        None,
        True,
        -3,
        2**63,
        -(2**64),
        0.1,
        "a",
        b"\x00",
        bytearray(b"b"),
        (1, [2]),
        {"k": {1, 2}},
        frozenset({3}),
        2j,
    ]
    kept = []
    sent = json.loads(json.dumps(encode([*value, object], lambda x: kept.append(x) or 5)))
    *back, stand_in = decode(sent, lambda number: ("number", number))
    assert back == value
    assert [type(x) for x in back] == [type(x) for x in value]
    assert (stand_in, kept) == (("number", 5), [object])


@pytest.mark.slow
@pytest.mark.skipif(not HUMANEVAL.is_file(), reason="no HumanEval beside the project")
def test_every_solution_of_humaneval_passes_and_no_other_ones_do(isolation):
    with gzip.open(HUMANEVAL, "rt") as file:
        rows = [json.loads(line) for line in file]
    names = ("prompt", "test", "entry_point")
    reward = CodeReward("test", entry_point="entry_point", prefix="prompt", isolation=isolation, limits=LIMITS)

    def scores_of(rows, completions):
        n = len(rows)
        columns = {name: [row[name] for row in rows] for name in names}
        return checked_scores(reward, Samples(["p"] * n, completions, [[1]] * n, [False] * n, columns)).tolist()

    assert scores_of(rows, [row["canonical_solution"] for row in rows]) == [1.0] * 164
    assert scores_of(rows[::8], ["    return True\n"] * 21) == [0.0] * 21
