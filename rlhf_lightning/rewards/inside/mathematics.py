"""Compares answers with math-verify, a line of JSON for each."""

import json
import re
import sys
from typing import Any

from math_verify import parse, verify

FUNCTION = re.compile(r"(?<![\\a-zA-Z])(sin|cos|tan|cot|sec|csc|log|ln|exp|gcd|lcm|max|min)\b")
WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")  # between dollars it would be a product of letters
OPERATOR = re.compile(r"[(){}\[\]^=*/+<>|\\]")


def read(truth: str) -> list[Any]:
    """The true answer, which datasets write with dollars and without; nothing if it is no mathematics.

    Of words ("5 apples") the number is read, of words and operators ("2*sqrt(3)") nothing: it would be half of it.
    """
    if "$" not in truth and "\\boxed" not in truth:
        truth = FUNCTION.sub(r"\\\1", truth)
        if WORD.search(truth) is None:
            truth = f"${truth}$"
        elif OPERATOR.search(truth):
            return []
    found: list[Any] = parse(truth, parsing_timeout=None)
    return found


def main(order: dict[str, Any]) -> None:
    """Answer until the input ends. Time is limited from outside."""
    for line in sys.stdin:
        question = json.loads(line)
        truth = read(question["truth"])
        given = parse(question["text"], parsing_timeout=None)
        right = bool(truth) and bool(given) and verify(truth, given, timeout_seconds=None)
        print(json.dumps({"readable": bool(truth), "right": bool(right)}), flush=True)
