"""Prompts that are held out: on one side with all their rows, whatever the rows are, with every column beside them."""

from collections import Counter

import pytest
from datasets import Dataset, DatasetDict

from rlhf_lightning.data.prompt_split import split_by_prompt
from rlhf_lightning.data.sources import Source
from rlhf_lightning.data.splits import Split, load_splits

PROMPTS = 100


def turns(i):
    return [{"role": role, "content": f"{role} {i}"} for role in ("user", "assistant", "user")]


def bot(text):
    return [{"role": "assistant", "content": text}]


def answers(i):
    """Three answers to some prompts, two or one to others, all different."""
    return [f"answer {n} to {i}" for n in range(1 + i % 3)]


FORMS = {
    "completions": lambda i: [{"prompt": f"prompt {i}", "completion": text} for text in answers(i)],
    "turns": lambda i: [{"prompt": turns(i), "completion": bot(text)} for text in answers(i)],
    "messages": lambda i: [{"messages": turns(i) + bot(text)} for text in answers(i)],
    "texts": lambda i: [{"text": f"text {i}"} for _ in answers(i)],
    "pairs": lambda i: [{"prompt": turns(i), "chosen": bot(text), "rejected": bot("no")} for text in answers(i)],
    "labels": lambda i: [{"prompt": turns(i), "completion": bot(text), "label": i % 2 == 0} for text in answers(i)],
    "rankings": lambda i: [
        {"prompt": turns(i), "completions": [bot(text), bot("no")], "ranks": [0.0, 1.0]} for text in answers(i)
    ],
    "steps": lambda i: [{"prompt": turns(i), "completions": [text, "so"], "labels": [1.0, 0.0]} for text in answers(i)],
}


def rows_of(form):
    """Rows of all prompts, those of one far from each other, with the index of their prompt and a number of their own."""
    made = [row | {"index": i} for i in range(PROMPTS) for row in FORMS[form](i)]
    return Dataset.from_list([made[(37 * n) % len(made)] | {"n": n} for n in range(len(made))])


@pytest.mark.parametrize("form", FORMS)
def test_no_prompt_is_on_both_sides(form):
    rows = rows_of(form)
    train, held_out = split_by_prompt(rows, 0.3, seed=0)
    assert set(train["index"]) | set(held_out["index"]) == set(range(PROMPTS))
    assert not set(train["index"]) & set(held_out["index"])
    assert 15 <= len(set(held_out["index"])) <= 45  # 30 expected, sd 4.6
    for part in (train, held_out):  # in their order, each with its own columns
        assert part["n"] == sorted(part["n"])
        assert part.to_list() == [rows[n] for n in part["n"]]
    counts = Counter(train["index"]) + Counter(held_out["index"])
    assert counts == {i: 1 + i % 3 for i in range(PROMPTS)}


def test_a_prompt_is_on_the_same_side_in_every_kind_of_rows():
    """Else what is held out of the preferences was trained on in the demonstrations."""
    sides = {form: set(split_by_prompt(rows_of(form), 0.3, seed=0)[1]["index"]) for form in FORMS}
    assert (
        sides["turns"] == sides["messages"] == sides["pairs"] == sides["labels"] == sides["rankings"] == sides["steps"]
    )


def test_seed_and_level_choose_others_and_the_share_only_more():
    rows = rows_of("turns")

    def held_out(fraction=0.3, seed=0, level=0):
        return set(split_by_prompt(rows, fraction, seed, level)[1]["index"])

    choices = [held_out(), held_out(seed=1), held_out(level=1), held_out(level=2), held_out(seed=1, level=1)]
    assert all(a != b for i, a in enumerate(choices) for b in choices[:i])
    assert held_out(0.1) < held_out() < held_out(0.6)


class Given(Source):
    def __init__(self, rows):
        self.rows = rows

    def load(self, kind):
        return DatasetDict(train=self.rows)


def test_a_source_is_divided_by_the_seed_and_the_level_of_its_rows():
    """As prompts with their columns, which reward functions read."""
    rows = rows_of("turns")

    def parts(seed=0, rows=rows):
        return load_splits(Given(rows), "prompts", None, Split(validation=0.3, seed=seed))

    first = parts()
    for part in first.values():
        assert [row["prompt"] for row in part] == [turns(i) for i in part["index"]]
        assert [row["index"] for row in part] == [rows[n]["index"] for n in part["n"]]
    held_out = {name: set(found["validation"]["index"]) for name, found in (("0", first), ("1", parts(1)))}
    assert held_out["0"] == set(split_by_prompt(rows, 0.3, 0)[1]["index"])
    assert held_out["1"] == set(split_by_prompt(rows, 0.3, 1)[1]["index"])
