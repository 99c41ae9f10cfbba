"""Types and values of keys, in the words of the help page."""

import types
import typing
from datetime import timedelta
from pathlib import Path
from typing import Any

WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null", Any: "anything"}
WORDS |= {dict: "mapping", list: "list", tuple: "list", Path: "path", timedelta: "time span"}
UNIONS = (typing.Union, types.UnionType)


def in_words(kind: Any) -> str:
    """A type hint as it is said: "whole number or null"."""
    parts = list(dict.fromkeys(_parts(kind)))
    return " or ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _parts(kind: Any) -> list[str]:
    """What a type hint allows, each as it is said."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return [str(value) for value in inside]
    if origin is typing.Annotated:
        return _parts(inside[0])
    if origin in UNIONS:
        return [said for part in inside for said in _parts(part)]
    name = getattr(origin, "__name__", "")
    if origin in (list, tuple, set) or name in ("Iterable", "Sequence"):
        return [f"list of {in_words(inside[0])}" if inside else "list"]
    if origin is dict:
        return ["mapping"]
    if name == "Callable":
        return _parts(inside[-1])
    return [WORDS[kind] if kind in WORDS else str(getattr(kind, "__name__", kind))]


def shown(value: Any) -> str:
    """A default as YAML writes it."""
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    if isinstance(value, list | tuple):
        return f"[{', '.join(shown(part) for part in value)}]"
    if hasattr(value, "class_path"):
        return str(value.class_path).rpartition(".")[2]
    return f"{value:g}" if isinstance(value, float) else str(value)
