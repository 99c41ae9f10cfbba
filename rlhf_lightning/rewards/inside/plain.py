"""Values between two processes that do not trust each other: JSON, so that reading them can't run anything."""

import itertools
import os
import socket
from collections import deque
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from types import TracebackType
from typing import Any

LONGEST = 1 << 24  # bytes of a message
MOST = 10_000  # items of an iterator, which may have no end


class Caught:
    """What the block raised. The code in it is not ours, and may raise anything."""

    error: BaseException | None = None

    def __enter__(self) -> "Caught":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> bool:
        self.error = error
        return True


def quiet(*descriptors: int) -> None:
    """Point file descriptors at nothing."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(nothing, descriptor)
    os.close(nothing)


def encode(value: Any, other: Callable[[Any], Any]) -> Any:
    """A value as JSON: numbers, text, None and what Python builds of them.

    Args:
        value: Anything.
        other: Gives what stands for an object that is none of these.
    """
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):  # long ones in hexadecimal: Python limits how many decimal digits it reads
        return int(value) if -(2**63) <= value < 2**63 else {"int": hex(value)}
    if isinstance(value, list | range | deque | ValuesView | KeysView | ItemsView):
        return [encode(x, other) for x in value]
    if isinstance(value, Iterator):
        items = list(itertools.islice(value, MOST + 1))
        return {"iterator": [[encode(x, other) for x in items[:MOST]], len(items) > MOST]}
    if isinstance(value, dict):
        return {"dict": [[encode(k, other), encode(v, other)] for k, v in value.items()]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(x, other) for x in value]}
    if isinstance(value, bytes | bytearray):
        return {"bytes" if isinstance(value, bytes) else "bytearray": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if hasattr(value, "tolist"):  # an array or a number of numpy's
        return encode(value.tolist(), other)
    return {"object": other(value)}


def decode(value: Any, other: Callable[[Any], Any]) -> Any:
    """The way back; every value is of one of Python's own types, or what ``other`` makes of the stand-in."""
    if isinstance(value, list):
        return [decode(x, other) for x in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "object":
        return other(content)
    if kind == "dict":
        return {decode(k, other): decode(v, other) for k, v in content}
    readers: dict[str, Callable[[Any], Any]] = {
        "int": lambda x: int(x, 16),
        "bytes": bytes.fromhex,
        "bytearray": bytearray.fromhex,
        "complex": lambda x: complex(*x),
        "iterator": lambda x: once_more(decode(x[0], other), x[1]),
    }
    if kind in readers:
        return readers[kind](content)
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](decode(content, other))


def once_more(items: list[Any], has_more: bool) -> Iterator[Any]:
    """An iterator over what came of another one."""
    yield from items
    if has_more:
        raise OverflowError(f"an iterator of the program's was followed for {MOST} items")


class Lines:
    """Messages of one line each over a socket."""

    def __init__(self, descriptor: int) -> None:
        self.stream = socket.socket(fileno=descriptor).makefile("rwb")

    def send(self, line: bytes) -> None:
        self.stream.write(line + b"\n")
        self.stream.flush()

    def receive(self) -> bytes:
        """The next line.

        Raises:
            EOFError: If the other side is gone, or its message is too long.
        """
        line = self.stream.readline(LONGEST)
        if not line.endswith(b"\n"):
            raise EOFError("the other side is gone")
        return line
