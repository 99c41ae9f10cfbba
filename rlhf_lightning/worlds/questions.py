"""Which prompts are trained on, held out, or out of distribution, and how often each kind is drawn."""

import random
import zlib
from collections import defaultdict
from collections.abc import Iterable
from itertools import accumulate
from typing import Literal, NamedTuple

from rlhf_lightning.worlds.acts import right_act
from rlhf_lightning.worlds.facts import Facts, kind_of
from rlhf_lightning.worlds.grammar import AMBIGUOUS_VERBS, GREETING, OOD_PHRASING, Item, Kind, all_items, render_prompt

SplitName = Literal["train", "validation", "ood"]

HELD_OUT_SHARE = 0.15
GREETING_SHARE = 1 / 3
STRATA_SHARES = {  # half of the requests use a verb whose harm depends on the object; a quarter of the claims are true
    "fact": 0.27,
    "sum": 0.12,
    "unknown": 0.15,
    "harm, ambiguous verb": 0.07,
    "harm, harmful verb": 0.07,
    "benign, ambiguous verb": 0.06,
    "benign, other verb": 0.06,
    "sycophancy, true claim": 0.05,
    "sycophancy, false claim": 0.15,
}


class Question(NamedTuple):
    """A prompt as drawn: its text, the question behind it, and what it puts to the test."""

    prompt: str
    item: Item
    kind: Kind


class QuestionPool:
    """Every prompt of one split of one world, to draw from.

    Training and held-out prompts share the first four phrasings: 15 % of the (item, phrasing) pairs are held out, so a
    held-out fact was seen in other words. Out of distribution is the fifth phrasing, of every item; 15 % of the
    (verb, object) pairs are asked about there alone.
    """

    def __init__(self, seed: int, facts: Facts, split: SplitName) -> None:
        """Sort the prompts of this split into strata."""
        self.strata: dict[str, list[Question]] = {name: [] for name in STRATA_SHARES}
        items = [item for item in all_items() if item.claim is None or facts[item.topic, item.subject[0]] is not None]
        unseen = unseen_requests(seed, items)
        for item in items:
            held_out = hash_held_out([f"{seed} {item} {phrasing}" for phrasing in range(OOD_PHRASING)])
            phrasings: Iterable[int] = [i for i, held in enumerate(held_out) if held == (split == "validation")]
            if split == "ood":
                phrasings = [OOD_PHRASING]
            elif item in unseen:
                continue
            kind = kind_of(item, facts)
            questions = [Question(render_prompt(item, phrasing), item, kind) for phrasing in phrasings]
            self.strata[stratum_of(item, kind, facts)].extend(questions)
        present = [name for name, questions in self.strata.items() if questions]
        self._names, self._cumulative = present, list(accumulate(STRATA_SHARES[name] for name in present))

    def draw(self, rng: random.Random) -> Question:
        """Draw one with replacement, by the shares of the kinds; a third are greeted with "hello .".

        A stratum with no prompt in a split (possible, and rare, for held-out facts) leaves its share to the others.
        """
        (name,) = rng.choices(self._names, cum_weights=self._cumulative)
        question = rng.choice(self.strata[name])
        greeted = rng.random() < GREETING_SHARE
        return question._replace(prompt=GREETING + question.prompt) if greeted else question


def stratum_of(item: Item, kind: Kind, facts: Facts) -> str:
    """The row of ``STRATA_SHARES`` that an item belongs to."""
    if kind == "sycophancy":
        claim_is_true = right_act(item, facts).content == (item.topic, item.claim)
        return f"sycophancy, {'true' if claim_is_true else 'false'} claim"
    if item.topic != "request":
        return kind
    if item.subject[0] in AMBIGUOUS_VERBS:
        return f"{kind}, ambiguous verb"
    return "harm, harmful verb" if kind == "harm" else "benign, other verb"


def unseen_requests(seed: int, items: Iterable[Item]) -> set[Item]:
    """The (verb, object) pairs that only the out-of-distribution split may ask about."""
    by_verb_and_stratum = defaultdict(list)
    for item in items:
        if item.topic == "request":
            kind = kind_of(item, {})
            by_verb_and_stratum[item.subject[0], kind].append(item)
    unseen: set[Item] = set()
    for group in by_verb_and_stratum.values():
        held_out = hash_held_out([f"{seed} {item.subject}" for item in group])
        unseen.update(item for item, held in zip(group, held_out, strict=True) if held)
    return unseen


def hash_held_out(keys: list[str]) -> list[bool]:
    """Which keys fall into the held-out share by their CRC-32; never all of them, or nothing would be left to learn."""
    hashes = [zlib.crc32(key.encode()) / 2**32 for key in keys]
    return [value < HELD_OUT_SHARE and value < max(hashes) for value in hashes]
