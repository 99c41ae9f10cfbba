"""Six simulated annotators: whom a pair of responses is shown to, and what they are likely to say.

They see the gold reward through noise. Half of them like polite words a little, half dislike them; an annotator may
also be length-biased, liking every further word, which is what a reward model then learns to pay for.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_lightning.worlds.gold import GoldScore

NOISE = 0.2  # temperature of the Bradley-Terry choice, in units of utility
POLITE_TASTE = 0.05  # for each polite word, up to MAX_POLITE_WORDS
MAX_POLITE_WORDS = 2
WORD_TASTE = 0.06  # of a length-biased annotator, for each word

LengthBias = Literal["none", "half", "all"]


@dataclass(frozen=True)
class Annotator:
    """One simulated person. ``lapse`` in [0, 1] is how often they answer without looking."""

    name: str
    group: Literal["polite", "direct"]
    lapse: float
    length_biased: bool = False

    def utility(self, score: GoldScore) -> float:
        """How much they like a response: the gold reward, their taste for politeness, and length where biased."""
        taste = POLITE_TASTE * min(score.polite_words, MAX_POLITE_WORDS)
        liking = taste if self.group == "polite" else -taste
        if not self.length_biased:
            return score.reward + liking
        without_penalty = min(1.0, max(-1.0, score.unclipped + score.length_penalty))
        return without_penalty + WORD_TASTE * score.words + liking

    def prefers_first(self, first: GoldScore, second: GoldScore) -> float:
        r"""The probability that they choose the first: ``lapse / 2 + (1 - lapse) sigmoid((u1 - u2) / .2)``.

        Source: Bradley and Terry 1952, with a lapse rate as in psychophysics (Wichmann and Hill 2001).
        """
        difference = (self.utility(first) - self.utility(second)) / NOISE
        return self.lapse / 2 + (1 - self.lapse) / (1 + math.exp(-difference))

    def likes(self, score: GoldScore) -> float:
        """The probability that they like a response that they see alone: as if it were compared with one of utility zero."""
        return self.lapse / 2 + (1 - self.lapse) / (1 + math.exp(-self.utility(score) / NOISE))


def annotators(length_bias: LengthBias = "none") -> tuple[Annotator, ...]:
    """The six; ``length_bias`` says how many are length-biased (where half, two of a group and one of the other)."""
    biased = {"none": (), "half": (0, 3, 4), "all": range(6)}[length_bias]
    return tuple(
        Annotator(f"annotator_{i + 1}", "polite" if i % 2 == 0 else "direct", (0.02, 0.04, 0.06)[i // 2], i in biased)
        for i in range(6)
    )


def noisy_ranks(rng: random.Random, annotator: Annotator, scores: Sequence[GoldScore]) -> list[int]:
    """The places that an annotator gives to several responses, 0 for the best.

    By Plackett-Luce: noise of Gumbel's kind is added to each utility, so that of any two the better is put first as often as
    in a comparison of those two; an annotator who does not look (a lapse) deals out the places at random.
    """
    lapsed = rng.random() < annotator.lapse
    liked = [0.0 if lapsed else annotator.utility(score) / NOISE for score in scores]
    noisy = [value - math.log(-math.log(1 - rng.random())) for value in liked]
    order = sorted(range(len(scores)), key=lambda i: -noisy[i])
    return [order.index(i) for i in range(len(scores))]


def bayes_accuracy(pairs: Iterable[tuple[GoldScore, GoldScore]], judges: Sequence[Annotator]) -> float:
    """The best expected accuracy of anyone who sees a pair, but not which annotator labelled it.

    Args:
        pairs: Scores of the two responses of each pair, in any order.
        judges: Who may have labelled it, each equally likely.

    Returns:
        The mean over pairs of the probability of the likelier label, in [.5, 1].

    Raises:
        ValueError: If there are no pairs.
    """
    likelier = []
    for first, second in pairs:
        agreed = sum(judge.prefers_first(first, second) for judge in judges) / len(judges)
        likelier.append(max(agreed, 1 - agreed))
    if not likelier:
        raise ValueError("the Bayes accuracy of no pairs is undefined")
    return sum(likelier) / len(likelier)
