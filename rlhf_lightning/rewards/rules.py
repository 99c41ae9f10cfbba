"""Rules that a response follows or not: format, JSON, length, repetition."""

import json
import re
from typing import Any, Literal

import regex
import torch
from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.rewards import soft_overlong_penalty
from rlhf_lightning.rewards.answers import column
from rlhf_lightning.rewards.reward import Reward, Samples

Unit = Literal["tokens", "words", "characters"]
THINK = r"<think>(?!.*<think>).*?</think>.*"
FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL)


class FormatReward(Reward):
    """1 where a regular expression fits the whole response, or is found in it; else 0."""

    def __init__(
        self, pattern: str = THINK, whole: bool = True, seconds: float = 1.0, skip_special_tokens: bool = True
    ) -> None:
        """Compile the expression; a dot stands for any character, newlines too.

        Args:
            pattern: In the syntax of Python's ``re``. As given: thoughts in <think> tags, once, then the answer.
            whole: Whether it has to fit the whole response, blanks at its ends aside.
            seconds: For one response.
            skip_special_tokens: Leave special tokens out of the text. False where the pattern has some of them, as the tags of
                some models are: then every token that was sampled is in the text, the closing EOS included.

        Raises:
            UserError: If it is no regular expression.
        """
        self.whole, self.seconds = whole, seconds
        self.skip_special_tokens = self.skips_special_tokens = skip_special_tokens
        try:
            self.pattern = regex.compile(pattern, regex.DOTALL)
        except regex.error as error:
            raise UserError(f"FormatReward: the pattern {pattern!r} is no regular expression: {error}") from error

    def score(self, samples: Samples) -> list[float | None]:
        return [float(self._fits(text.strip())) for text in samples.texts(self.skip_special_tokens)]

    def _fits(self, text: str) -> bool:
        fits = self.pattern.fullmatch if self.whole else self.pattern.search
        try:
            return fits(text, timeout=self.seconds) is not None
        except TimeoutError as error:
            raise UserError(
                f"FormatReward: the pattern {self.pattern.pattern!r} took more than {self.seconds:g} s on the response "
                f"{text[:80]!r}; write it without repetitions of repetitions"
            ) from error


class JSONSchemaReward(Reward):
    """1 for a response that is JSON and fits a schema, ``parsable`` for other JSON, 0 for anything else.

    A response may stand in a fence of three backticks: then what is in its last one counts.
    """

    def __init__(self, schema: dict[str, Any] | None = None, column: str | None = None, parsable: float = 0.0) -> None:
        """Check the schema.

        Args:
            schema: The same for all rows.
            column: Or the column with each row's own, as an object or as text.
            parsable: What JSON is worth that does not fit.

        Raises:
            UserError: If jsonschema is not installed, the schema is none, or not just one of the two is given.
        """
        if (schema is None) == (column is None):
            raise UserError("JSONSchemaReward: give either a schema or the column with one for each row")
        self.column, self.parsable = column, parsable
        self.validator = None if schema is None else _validator(schema)

    def score(self, samples: Samples) -> list[float | None]:
        if self.column is None:
            validators = [self.validator] * len(samples.completions)
        else:
            validators = [_validator(value) for value in column(samples, self.column, self.name)]
        return [self._score(v, text) for v, text in zip(validators, samples.completions, strict=True)]

    def _score(self, validator: Any, text: str) -> float:
        fenced = FENCED.findall(text)
        try:
            value = json.loads(fenced[-1] if fenced else text, parse_constant=_refuse)
            return 1.0 if validator.is_valid(value) else self.parsable
        except (ValueError, RecursionError):  # no JSON, or nested deeper than anything that is meant
            return 0.0


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _validator(schema: Any) -> Any:
    try:
        from jsonschema import SchemaError
        from jsonschema.validators import validator_for
        from referencing import Registry
    except ModuleNotFoundError as error:
        raise UserError("JSONSchemaReward needs jsonschema: pip install 'rlhf_lightning[rules]'") from error
    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        kind = validator_for(schema)
        kind.check_schema(schema)
    except (ValueError, SchemaError) as error:
        raise UserError(
            f"JSONSchemaReward: {str(schema)[:80]!r} is no JSON schema: {str(error).splitlines()[0]}"
        ) from error
    return kind(schema, registry=Registry())  # which fetches nothing: a schema has to hold what it refers to


class LengthReward(Reward):
    """0 for a length from ``least`` to ``most``, and minus ``cost`` for each unit outside of it."""

    def __init__(self, least: int = 0, most: int | None = None, cost: float = 0.01, unit: Unit = "tokens") -> None:
        """Remember the bounds.

        Args:
            least: Shortest length that costs nothing.
            most: Longest; None for no such.
            cost: Of one unit too few or too many.
            unit: "tokens" (of the policy, the end included), "words" or "characters".

        Raises:
            UserError: If no length is free.
        """
        if least < 0 or (most is not None and most < least) or (least == 0 and most is None):
            raise UserError(f"LengthReward: least {least} and most {most} leave nothing to reward; give a bound")
        self.least, self.most, self.cost, self.unit = least, most, cost, unit
        self.skips_special_tokens = unit != "tokens"

    def score(self, samples: Samples) -> Tensor:
        lengths = torch.tensor([len(units) for units in _units(samples, self.unit)], dtype=torch.float32)
        outside = (self.least - lengths).clamp(min=0)
        if self.most is not None:
            outside = outside + (lengths - self.most).clamp(min=0)
        return -self.cost * outside


class OverlongPenalty(Reward):
    """DAPO's soft penalty: 0 up to ``max_length - buffer`` tokens, then straight down to -1 at ``max_length`` and beyond."""

    skips_special_tokens = False  # it counts tokens

    def __init__(self, max_length: int, buffer: int) -> None:
        """Check the lengths.

        Args:
            max_length: Tokens from which on the penalty is -1; usually ``sampling.max_new_tokens``.
            buffer: Number of tokens before that over which the penalty grows.
        """
        if not 1 <= buffer <= max_length:
            raise UserError(f"OverlongPenalty: a buffer of {buffer} tokens; it is from 1 to max_length, {max_length}")
        self.max_length, self.buffer = max_length, buffer

    def score(self, samples: Samples) -> Tensor:
        lengths = torch.tensor([len(ids) for ids in samples.completion_ids])
        return soft_overlong_penalty(lengths, max_length=self.max_length, buffer=self.buffer)


class RepetitionPenalty(Reward):
    """Minus the share of n-grams that stood there before: 0 where none is repeated, towards -1 for one word over and over."""

    def __init__(self, n: int = 3, unit: Unit = "words") -> None:
        """Check the length.

        Args:
            n: Length of an n-gram.
            unit: "words" (without case), "tokens" or "characters".
        """
        if n < 1:
            raise UserError(f"RepetitionPenalty: n is at least 1, not {n}")
        self.n, self.unit = n, unit
        self.skips_special_tokens = unit != "tokens"

    def score(self, samples: Samples) -> list[float | None]:
        return [self._score(units) for units in _units(samples, self.unit)]

    def _score(self, units: list[Any]) -> float:
        grams = [tuple(units[i : i + self.n]) for i in range(len(units) - self.n + 1)]
        return len(set(grams)) / len(grams) - 1 if grams else 0.0


def _units(samples: Samples, unit: Unit) -> list[list[Any]]:
    if unit == "tokens":
        return samples.completion_ids
    return [list(text) if unit == "characters" else text.casefold().split() for text in samples.completions]
