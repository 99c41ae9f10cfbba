"""Tool calls and tools as templates take them: objects, where the wire format has JSON text."""

import json
from typing import Any


def parse_json(text: str) -> Any:
    """A list or object from JSON text; None where it is something else."""
    try:
        parsed = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, list | dict) else None


def refuse(constant: str) -> None:
    """Raise ValueError: NaN and infinities are no JSON."""
    raise ValueError(f"{constant} is no JSON")


def as_object(value: Any) -> Any:
    """The object that a text spells in JSON; anything else as it is."""
    parsed = parse_json(value) if isinstance(value, str) else None
    return parsed if isinstance(parsed, dict) else value


def with_objects(call: Any, *names: str) -> Any:
    """A tool or a call of one, whose keys ``names`` are objects, at the top and under "function"."""
    call = as_object(call)
    if not isinstance(call, dict):
        return call
    read = {name: as_object(value) if name in names else value for name, value in call.items()}
    return {**read, "function": with_objects(read["function"], *names)} if "function" in read else read


def read_tool_calls(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose tool calls are objects; a ``function_call``, which came before them, is one of them."""
    calls = message.get("tool_calls")
    if isinstance(calls, str):
        calls = parse_json(calls) or calls
    if not calls and message.get("function_call"):
        function = as_object(message["function_call"])
        calls = [{"type": "function", "function": function}] if isinstance(function, dict) else None
        message = {name: value for name, value in message.items() if name != "function_call" or calls is None}
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [with_objects(call, "arguments") for call in calls]}
