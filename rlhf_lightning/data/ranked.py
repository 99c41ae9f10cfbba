"""Rows with several answers to one prompt, put into an order by people: formats, and the view of the kind "rankings"."""

from typing import Any

from rlhf_lightning.data.annotations import is_number
from rlhf_lightning.data.messages import Prompt
from rlhf_lightning.data.rows import Example, NoSignalError, Row, read_answer, read_prompt
from rlhf_lightning.errors import UserError


def ranking(row: Row) -> Example:
    """``prompt``, ``completions`` and ``ranks``: a number each, the lowest is the best, equal numbers are a tie."""
    prompt = read_prompt(row)
    completions = read_completions(row, prompt)
    return Example(prompt=prompt, completions=completions, ranks=read_ranks(row.get("ranks"), len(completions)))


def ordering(row: Row) -> Example:
    """``prompt``, ``completions`` and ``ranking``: the numbers of the completions, from 0 on, the best first."""
    prompt = read_prompt(row)
    completions = read_completions(row, prompt)
    places, count = row.get("ranking"), len(completions)
    if not isinstance(places, list) or not all(isinstance(place, int) for place in places):
        raise UserError(f"column 'ranking' is {places!r:.60}; it must list the numbers of the completions, best first")
    if unknown := [place for place in places if not 0 <= place < count]:
        raise UserError(f"column 'ranking' names completion {unknown[0]}; there are {count}, numbered from 0")
    if len(set(places)) < len(places):
        repeated = next(place for place in places if places.count(place) > 1)
        raise UserError(f"column 'ranking' names completion {repeated} more than once")
    if len(places) < count:
        missing = next(place for place in range(count) if place not in places)
        raise UserError(f"column 'ranking' leaves out completion {missing}; rank all {count}, or leave it out of both")
    return Example(prompt=prompt, completions=completions, ranks=[float(places.index(i)) for i in range(count)])


def nemo_ranking(row: Row) -> Example:
    """NeMo's: ``context`` (messages) and ``completions``, each of them with a ``rank`` and a ``completion``."""
    prompt = read_prompt({"prompt": row.get("context")})
    given = row.get("completions")
    if not isinstance(given, list) or not all(isinstance(part, dict) for part in given):
        raise UserError("column 'completions' must be a list of objects with 'rank' and 'completion'")
    completions = read_completions({"completions": [part.get("completion") for part in given]}, prompt)
    return Example(
        prompt=prompt, completions=completions, ranks=read_ranks([part.get("rank") for part in given], len(given))
    )


def has_rank_objects(row: Row) -> bool:
    """Whether completions come with their ranks."""
    given = row.get("completions")
    return isinstance(given, list) and bool(given) and isinstance(given[0], dict) and "rank" in given[0]


def read_completions(row: Row, prompt: Prompt) -> list[Prompt]:
    """The column "completions": answers to the prompt, no two of them the same.

    Raises:
        NoSignalError: If two are.
        UserError: If it is no list of answers.
    """
    given = row.get("completions")
    if not isinstance(given, list) or not given:
        raise UserError("column 'completions' must be a list of answers, not empty")
    answers = [read_answer({"completions": answer}, "completions", prompt, may_be_empty=True) for answer in given]
    if any(answer in answers[:place] for place, answer in enumerate(answers)):
        raise NoSignalError("the same completion twice")
    return answers


def read_ranks(ranks: Any, count: int) -> list[float]:
    """A number for each completion.

    Raises:
        UserError: If there are others, or not as many.
    """
    if not isinstance(ranks, list) or len(ranks) != count:
        found = f"{len(ranks)} ranks" if isinstance(ranks, list) else repr(ranks)[:40]
        raise UserError(f"{found} for {count} completions; give one each, the lowest for the best")
    if wrong := [rank for rank in ranks if not is_number(rank)]:
        raise UserError(f"a rank is {wrong[0]!r:.40}; it must be a finite number, the lowest for the best")
    return [float(rank) for rank in ranks]


def as_ranking(example: Example) -> Row:
    """``prompt``, ``completions`` and ``ranks``; a pair is a ranking of two.

    Raises:
        NoSignalError: If no two are told apart.
        UserError: If the row ranks nothing.
    """
    if example.chosen is not None and example.rejected is not None:
        answers, ranks = [example.chosen, example.rejected], [0.0, 1.0]
        if example.chosen == example.rejected:
            raise NoSignalError("the same text as chosen and rejected")
    elif example.completions is not None and example.ranks is not None:
        answers, ranks = example.completions, example.ranks
    else:
        raise UserError("rankings need several answers to one prompt: columns 'prompt', 'completions', 'ranks'")
    if len(set(ranks)) == 1:
        raise NoSignalError("no two completions told apart")
    return {"prompt": example.prompt, "completions": answers, "ranks": ranks}


def as_pairs(example: Example) -> list[Row]:
    """``prompt``, ``chosen`` and ``rejected`` of every two completions of a ranking that are told apart."""
    row = as_ranking(example)
    both = list(zip(row["completions"], row["ranks"], strict=True))
    return [
        {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}
        for chosen, high in both
        for rejected, low in both
        if high < low
    ]


def best(example: Example) -> Prompt | None:
    """The best of ranked answers, the first of several; None where nothing is ranked."""
    if example.completions is None or example.ranks is None:
        return None
    return example.completions[example.ranks.index(min(example.ranks))]
