"""Embedded worlds: data, a tokenizer and a true reward that no trainer sees."""

from rlhf_lightning.worlds.annotators import Annotator, annotators, bayes_accuracy
from rlhf_lightning.worlds.enumerable import EnumerableWorld
from rlhf_lightning.worlds.gold import GoldScore, gold_score
from rlhf_lightning.worlds.hhh import HHHWorld
from rlhf_lightning.worlds.sums import SumsWorld
from rlhf_lightning.worlds.tokenizer import world_tokenizer

__all__ = [
    "Annotator",
    "EnumerableWorld",
    "GoldScore",
    "HHHWorld",
    "SumsWorld",
    "annotators",
    "bayes_accuracy",
    "gold_score",
    "world_tokenizer",
]
