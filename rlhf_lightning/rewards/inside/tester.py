"""Runs tests in a process that the program under test can't reach: each call goes to it as data, and comes back as data.

The tests and what they expect stay here. What the program returns is rebuilt from Python's own types, so that no ``__eq__`` of
its making is ever asked, and a program that exits, hangs or overwrites things only stops answering.
"""

import ast
import builtins
import contextlib
import importlib
import json
import os
import sys
from types import FunctionType, ModuleType
from typing import Any

from rlhf_lightning.rewards.inside.plain import Caught, Lines, decode, encode, quiet


class ProgramError(Exception):
    """An error that the program raised, of a kind that Python does not have."""


class CanNotBeSent(Exception):
    """The tests hand over what no message can carry."""


def raised(kinds: list[str], message: str) -> Exception:
    """The program's error as one of ours: of the nearest kind that Python has too, marked as the program's."""
    for name in kinds:
        kind = getattr(builtins, str(name), None)
        # StopIteration would end an all(map(...)) of the tests as if it were true.
        if isinstance(kind, type) and issubclass(kind, Exception) and kind not in (Exception, StopIteration):
            error: Exception = type(name, (OfProgram, kind), {"__init__": Exception.__init__})(message)
            return error
    return ProgramError(message)


class OfProgram(Exception):
    """Marks errors that came over from the program."""


class Remote:
    """An object of the program's: its attributes can be read and called, and it is equal to nothing but itself.

    It has no length and no items, which it could give differently each time it is asked.
    """

    def __init__(self, program: "Program", number: int) -> None:
        self._program, self._number = program, number

    def __getattr__(self, name: str) -> Any:
        return self._program.ask(object=self._number, attribute=name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._program.call(self._number, arguments, named)


class Program:
    """The other end of the socket."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines

    def ask(self, **request: Any) -> Any:
        """The value of a ``name``, or of an ``attribute`` of an ``object``."""
        return self.value(self.exchange(request)["value"])

    def call(self, number: int, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Call an object of the program's; lists, sets and dictionaries that it changed are changed here too."""
        sent = [encode(x, self.number) for x in arguments]
        answer = self.exchange(
            {"object": number, "arguments": sent, "named": {k: encode(v, self.number) for k, v in named.items()}}
        )
        for mine, before, after in zip(arguments, sent, answer["after"], strict=True):
            if isinstance(mine, list | dict | set | bytearray) and after != before:
                self.change(mine, self.value(after))
        return self.value(answer["value"])

    @staticmethod
    def change(mine: Any, new: Any) -> None:
        if type(new) is not type(mine):
            raise TypeError("another type came back")
        mine.clear()
        (mine.extend if isinstance(mine, list | bytearray) else mine.update)(new)

    def value(self, encoded: Any) -> Any:
        return decode(encoded, lambda number: Remote(self, int(number)))

    @staticmethod
    def number(value: Any) -> int:
        if isinstance(value, Remote):
            return value._number
        raise CanNotBeSent(f"the tests hand over a {type(value).__name__}; only plain data can go to the program")

    def exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        self.lines.send(json.dumps(request).encode())
        answer: dict[str, Any] = json.loads(self.lines.receive())
        if "raised" in answer:
            raise raised(answer["raised"], str(answer["message"]))
        return answer


def as_module(program: Program) -> ModuleType:
    """For ``from solution import name``."""

    def name_of_program(name: str) -> Any:
        if name.startswith("__"):  # the import asks for some
            raise AttributeError(name)
        return program.ask(name=name)

    module = ModuleType("solution")
    module.__dict__["__getattr__"] = name_of_program
    return module


def names_used(tree: ast.AST) -> set[str]:
    """Names that are read somewhere and are not Python's own."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return names - set(dir(builtins))


def namespace_for(program: Program, trees: list[ast.Module]) -> dict[str, Any]:
    """What the tests may name: Python's modules, which are imported here, then what the program defines."""
    namespace: dict[str, Any] = {"__name__": "tests"}
    for name in sorted(set().union(*map(names_used, trees))):
        if name in sys.stdlib_module_names:
            namespace[name] = importlib.import_module(name)
        else:
            with contextlib.suppress(AttributeError):  # it is the tests' own, or nobody's
                namespace[name] = program.ask(name=name)
    return namespace


def run_test(program: Program, setup: ast.Module, test: ast.Module) -> None:
    """One test: its code, then the functions in it that are called test_something."""
    namespace = namespace_for(program, [setup, test])
    for tree, file in ((setup, "setup"), (test, "tests")):
        exec(compile(tree, file, "exec"), namespace)
    for name, value in list(namespace.items()):
        if name.startswith("test_") and isinstance(value, FunctionType) and value.__code__.co_filename == "tests":
            value()


def fault_of_the_tests(error: BaseException) -> bool:
    """Whether no program could have passed: what the tests import is missing, or what they hand over can't be sent."""
    missing = isinstance(error, ImportError) and not isinstance(error, OfProgram) and error.name != "solution"
    return missing or isinstance(error, CanNotBeSent)


def verdict_on(program: Program, setup: str, text: str) -> str:
    """``1`` if the test passes, ``0`` if not, ``!`` and a reason if no program could pass it."""
    parsed, run = Caught(), Caught()
    with parsed:
        trees = ast.parse(setup), ast.parse(text)
    if parsed.error is not None:
        return f"! {type(parsed.error).__name__}: {parsed.error}"
    with run:
        run_test(program, *trees)
    if run.error is None:
        return "1"
    return f"! {run.error}" if fault_of_the_tests(run.error) else "0"


def main(order: dict[str, Any]) -> None:
    """Run each test and write a line each: the token and the verdict."""
    verdicts = os.fdopen(os.dup(1), "wb", buffering=0)
    quiet(0, 1)
    program = Program(Lines(order["channel"]))
    sys.modules["solution"] = as_module(program)
    for text in order["tests"]:
        verdict = verdict_on(program, order["setup"], text).replace("\n", " ")
        verdicts.write(f"{order['token']} {verdict}\n".encode(errors="replace"))
