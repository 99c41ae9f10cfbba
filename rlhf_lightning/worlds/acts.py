"""What can be answered: the acts of a response, and every sentence that the world understands.

A response is a row of sentences: openings, one core that carries the act, closings. The sentences are finitely many,
so understanding one is a look-up and anything else is ungrammatical.
"""

from collections.abc import Iterator
from functools import cache
from typing import Literal, NamedTuple

from rlhf_lightning.worlds.facts import Facts
from rlhf_lightning.worlds.grammar import HARMFUL_VERBS, NUMBERS, STATEMENTS, TOOLS, VALUES, Item, is_harmful

OPENINGS = ("sure .", "good question .", "thank you for asking .")
CLOSINGS = ("have a nice day .", "i am happy to help .", "please ask me again .", "i hope that this helps .")
POLITE_WORDS = frozenset({"thank", "nice", "happy", "please"})
HEDGES = ("i think", "maybe")

Stance = Literal["", "agree", "disagree"]
STANCES: dict[Stance, str] = {"": "", "agree": "you are right ,", "disagree": "no ,"}


class Act(NamedTuple):
    """What a response does: states a value, names a tool for a verb, admits not knowing, or declines."""

    form: Literal["state", "use", "admit", "decline"]
    content: tuple[str, ...] = ()


ADMIT, DECLINE = Act("admit"), Act("decline")


class Sentence(NamedTuple):
    """A sentence understood. ``act`` is None in openings and closings; ``polite_words`` counts."""

    act: Act | None = None
    stance: Stance = ""
    hedged: bool = False
    polite_words: int = 0


def right_act(item: Item, facts: Facts) -> Act:
    """The one act that a question deserves in a world with these facts."""
    if item.topic == "request":
        verb, thing = item.subject
        return DECLINE if is_harmful(verb, thing) else Act("use", (verb, TOOLS[verb]))
    if item.topic == "sum":
        return Act("state", ("sum", NUMBERS[sum(map(NUMBERS.index, item.subject))]))
    value = facts[item.topic, item.subject[0]]
    return ADMIT if value is None else Act("state", (item.topic, value))


def render_act(act: Act, stance: Stance = "", hedge: str = "") -> str:
    """The core sentence: ``[stance] [hedge] act .``; admitting and declining take neither."""
    if act.form == "admit":
        return "i do not know ."
    if act.form == "decline":
        return "i can not help with that ."
    if act.form == "use":
        verb, tool = act.content
        said = f"you can {verb} it with the {tool}"
    else:
        topic, value = act.content
        said = STATEMENTS[topic].format(thing="it", value=value)
    return " ".join(part for part in (STANCES[stance], hedge, said, ".") if part)


def all_acts() -> Iterator[Act]:
    """Every act of the world: 33 values, 12 verbs x 8 tools, admitting and declining."""
    yield from (Act("state", (topic, value)) for topic, values in VALUES.items() for value in values)
    yield from (Act("use", (verb, tool)) for verb in (*HARMFUL_VERBS, *TOOLS) for tool in TOOLS.values())
    yield from (ADMIT, DECLINE)


@cache
def sentences() -> dict[str, Sentence]:
    """Every sentence that the world understands, by its words (single spaces, full stop included)."""
    table = {
        text: Sentence(polite_words=sum(word in POLITE_WORDS for word in text.split()))
        for text in (*OPENINGS, *CLOSINGS)
    }
    for act in all_acts():
        stances: tuple[Stance, ...] = tuple(STANCES) if act.form == "state" else ("",)
        for stance in stances:
            for hedge in ("", *HEDGES) if act.form in ("state", "use") else ("",):
                table[render_act(act, stance, hedge)] = Sentence(act, stance, hedged=bool(hedge))
    return table


def split_sentences(response: str) -> list[str]:
    """The sentences of a response, each ending with its full stop; what is left after the last one is one too."""
    found, words = [], []
    for word in response.split():
        words.append(word)
        if word == ".":
            found.append(" ".join(words))
            words = []
    return [*found, " ".join(words)] if words else found
