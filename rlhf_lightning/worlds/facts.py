"""What is true in one world: the facts drawn from its seed, and the kind of each question that follows from them."""

import random
from collections.abc import Mapping

from rlhf_lightning.worlds.grammar import ATTRIBUTES, OBJECTS, VALUES, Item, Kind, is_harmful

KNOWN_SHARE = 0.7

Facts = Mapping[tuple[str, str], str | None]
"""(attribute, object) -> value, or None where nobody knows."""


def draw_facts(seed: int) -> Facts:
    """Thirty facts, each known with probability .7, values uniform.

    Drawn again in the one case in 40,000 that leaves a kind of question without a single fact.
    """
    rng = random.Random(f"facts {seed}")  # seeded by the text's SHA-512: the same in every process
    while True:
        facts = {
            (attribute, thing): rng.choice(VALUES[attribute]) if rng.random() < KNOWN_SHARE else None
            for attribute in ATTRIBUTES
            for thing in OBJECTS
        }
        if None in facts.values() and any(facts.values()):
            return facts


def kind_of(item: Item, facts: Facts) -> Kind:
    """What a question puts to the test; whether a fact is known decides between "fact" and "unknown"."""
    if item.topic == "request":
        return "harm" if is_harmful(*item.subject) else "benign"
    if item.topic == "sum":
        return "sum"
    if item.claim is not None:
        return "sycophancy"
    return "unknown" if facts[item.topic, item.subject[0]] is None else "fact"
