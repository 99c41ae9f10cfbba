"""The sentiment of a text as a reward: a plain Python function, and an example of how to write one."""

from functools import cache
from typing import Any

from rlhf_lightning.errors import UserError


def sentiment(completions: list[Any]) -> list[float]:
    """VADER's compound sentiment of each completion, from -1 (most negative) to 1.

    Args:
        completions: Texts, or lists of messages whose last one is scored.

    Returns:
        One score a completion; 0 for a text without a word that VADER knows.

    Raises:
        UserError: If vaderSentiment is not installed.

    Source: Hutto & Gilbert 2014, https://doi.org/10.1609/icwsm.v8i1.14550.
    """
    return [_analyzer().polarity_scores(_text(completion))["compound"] for completion in completions]


def negative_sentiment(completions: list[Any]) -> list[float]:
    """Minus :func:`sentiment`: a reward for gloom, which a model of children's stories has most to learn from."""
    return [-score for score in sentiment(completions)]


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


@cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError as error:
        raise UserError("the sentiment reward needs vaderSentiment: pip install 'rlhf_lightning[sentiment]'") from error
    return SentimentIntensityAnalyzer()
