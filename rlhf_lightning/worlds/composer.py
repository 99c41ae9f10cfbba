"""Simulated writers: good and bad responses as people might have written them, with hedges, openings and closings."""

import random

from rlhf_lightning.worlds.acts import (
    ADMIT,
    CLOSINGS,
    DECLINE,
    HEDGES,
    OPENINGS,
    Act,
    Stance,
    render_act,
    right_act,
)
from rlhf_lightning.worlds.facts import Facts
from rlhf_lightning.worlds.grammar import HARMFUL_VERBS, TOOLS, VALUES, Item, Kind
from rlhf_lightning.worlds.questions import Question

DEMONSTRATION_GOOD: dict[Kind, float] = {  # where most writers are wrong, copying them is not enough
    "fact": 0.7,
    "sum": 0.7,
    "unknown": 0.4,
    "harm": 0.4,
    "benign": 0.7,
    "sycophancy": 0.4,
}
CANDIDATE_GOOD = 0.5
DEMONSTRATION_VERBOSE, CANDIDATE_VERBOSE = 0.2, 0.3
HEDGED = 0.15
OPENED = 0.4
CLOSED = 0.35  # of those that are not verbose
STANCE_TAKEN = 0.5  # of the good answers to a claim


def compose_demonstration(rng: random.Random, question: Question, facts: Facts) -> str:
    """A response as a hired writer's: good with the probability of its kind."""
    good = rng.random() < DEMONSTRATION_GOOD[question.kind]
    return compose(rng, question, facts, good=good, verbose_share=DEMONSTRATION_VERBOSE)


def compose_candidates(rng: random.Random, question: Question, facts: Facts) -> tuple[str, str]:
    """Two different responses to be compared, each good with probability one half."""

    def candidate() -> str:
        return compose(rng, question, facts, good=rng.random() < CANDIDATE_GOOD, verbose_share=CANDIDATE_VERBOSE)

    first, second = candidate(), candidate()
    while second == first:
        second = candidate()
    return first, second


def compose(rng: random.Random, question: Question, facts: Facts, *, good: bool, verbose_share: float) -> str:
    """``[opening] core [closings]``: the core right or typically wrong, none of the closings twice."""
    act, stance = (good_act if good else wrong_act)(rng, question, facts)
    hedged = act.form in ("state", "use") and rng.random() < HEDGED
    core = render_act(act, stance, rng.choice(HEDGES) if hedged else "")
    opening = [rng.choice(OPENINGS)] if rng.random() < OPENED else []
    if rng.random() < verbose_share:
        closings = rng.sample(CLOSINGS, rng.choice((2, 3)))
    else:
        closings = [rng.choice(CLOSINGS)] if rng.random() < CLOSED else []
    return " ".join([*opening, core, *closings])


def good_act(rng: random.Random, question: Question, facts: Facts) -> tuple[Act, Stance]:
    """The right act; the answer to a claim says in half of the cases whether the claim holds."""
    act = right_act(question.item, facts)
    if question.kind != "sycophancy" or rng.random() >= STANCE_TAKEN:
        return act, ""
    return act, "agree" if act.content[-1] == question.item.claim else "disagree"


def wrong_act(rng: random.Random, question: Question, facts: Facts) -> tuple[Act, Stance]:
    """What writers get wrong about a question of this kind."""
    item, kind = question.item, question.kind
    if kind == "harm":
        return (use_any_tool(rng, item) if rng.random() < 0.85 else ADMIT), ""
    if kind == "benign":
        return (DECLINE if rng.random() < 0.6 else use_any_tool(rng, item)), ""
    if kind == "unknown":
        return (state_another_value(rng, item, facts) if rng.random() < 0.9 else DECLINE), ""
    if kind == "sycophancy":
        return wrong_answer_to_claim(rng, item, facts)
    return (state_another_value(rng, item, facts) if rng.random() < 0.8 else ADMIT), ""


def wrong_answer_to_claim(rng: random.Random, item: Item, facts: Facts) -> tuple[Act, Stance]:
    """Agrees with a false claim, or contradicts a true one; admits not knowing in a tenth of the cases."""
    if rng.random() >= 0.9:
        return ADMIT, ""
    claimed = Act("state", (item.topic, item.claim or ""))
    if claimed == right_act(item, facts):
        return state_another_value(rng, item, facts), "disagree"
    return claimed, "agree"


def state_another_value(rng: random.Random, item: Item, facts: Facts) -> Act:
    """Any value of the topic but the right one; where nobody knows, any value."""
    right = right_act(item, facts).content
    return Act("state", (item.topic, rng.choice([v for v in VALUES[item.topic] if (item.topic, v) != right])))


def use_any_tool(rng: random.Random, item: Item) -> Act:
    """A tool that is wrong for the verb asked about; harmful verbs have no right one."""
    verb = item.subject[0]
    right = None if verb in HARMFUL_VERBS else TOOLS[verb]
    return Act("use", (verb, rng.choice([tool for tool in TOOLS.values() if tool != right])))
