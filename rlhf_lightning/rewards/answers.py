"""Where a final answer stands in a text, and whether two of them are the same number or the same words."""

import re
from fractions import Fraction
from typing import Any, Literal

from rlhf_lightning.errors import UserError
from rlhf_lightning.rewards.reward import Samples

Place = Literal["boxed", "hashes", "last_number", "any"]
NUMBER = re.compile(r"(?<![\w.])[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?<=\d)(?:/\d+)?%?")


def column(samples: Samples, name: str, asker: str) -> list[Any]:
    """A column of the rows.

    Raises:
        UserError: If they have none of that name; says which they have.
    """
    if name not in samples.columns:
        there = ", ".join(sorted(samples.columns)) or "none beside the prompt"
        raise UserError(f"{asker} needs the column '{name}', which the rows have not; they have {there}")
    return samples.columns[name]


def boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{...}``, braces balanced; None without one that is closed."""
    start = text.rfind(r"\boxed{")
    depth = 0
    for end in range(start + len(r"\boxed"), len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + len(r"\boxed{") : end].strip()
    return None


def after_hashes(text: str) -> str | None:
    """The rest of the last line with ``####``, as GSM8K writes its answers; None without one."""
    _, mark, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0].strip() or None if mark else None


def last_number(text: str) -> str | None:
    """The last number; None without one."""
    found = NUMBER.findall(text)
    return found[-1] if found else None


def final_answer(text: str, place: Place) -> str | None:
    """The answer that a text arrives at, where it is to be looked for; "any": boxed, else after ####, else the last number."""
    finders = {"boxed": boxed, "hashes": after_hashes, "last_number": last_number}
    for finder in finders.values() if place == "any" else [finders[place]]:
        found = finder(text)
        if found is not None:
            return found
    return None


def same_answer(one: str, other: str) -> bool:
    """Equal as numbers (1,000 = 1000.0, 50% = 1/2, $ aside), else as words without case, blanks and a full stop."""
    first, second = as_number(one), as_number(other)
    if first is not None or second is not None:
        return first == second
    return _words(one) == _words(other)


def as_number(text: str) -> Fraction | None:
    """The exact value of a whole number, decimal, fraction or percentage; None for anything else."""
    text = _words(text).replace("$", "").replace(r"\%", "%").replace("\\", "")
    if len(text) > 1000 or not (match := NUMBER.fullmatch(text)):  # a power of ten too long to be anybody's answer
        return None
    digits, percent = match[0].replace(",", "").removesuffix("%"), match[0].endswith("%")
    numerator, _, denominator = digits.partition("/")
    if denominator and not int(denominator):
        return None
    value = Fraction(numerator) / int(denominator or 1)
    return value / 100 if percent else value


def _words(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".").strip()
