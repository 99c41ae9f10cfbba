"""Tables of the report, for the page and the terminal: columns without a value in any row are dropped."""

from collections.abc import Callable
from typing import Any, NamedTuple

from rlhf_lightning.evaluation.headline import main_condition, number, reward_of

Cell = Callable[[dict[str, Any]], str]
BEHAVIOURS = ("right", "harmful_compliance", "refused_benign", "sycophantic", "polite", "ungrammatical")


class Column(NamedTuple):
    """One column of a table.

    Attributes:
        title: Heading.
        term: Entry of the glossary that explains it; None where the title says it all.
        cells: Text of each row, "" where there is no value.
    """

    title: str
    term: str | None
    cells: list[str]


class Figures(NamedTuple):
    """A table whose first column has the names of the rows.

    Attributes:
        caption: What is in it.
        corner: Heading of the first column.
        names: Of the rows.
        columns: The others.
    """

    caption: str
    corner: str
    names: list[str]
    columns: list[Column]


def interval(value: dict[str, float] | None, digits: int = 2) -> str:
    """A mean with its 95 % interval, short."""
    if not value:
        return ""
    return f"{number(value['mean'], digits)} [{number(value['low'], digits)}, {number(value['high'], digits)}]"


def half_width(value: dict[str, float] | None) -> str:
    """A mean and half of its 95 % interval, shorter still."""
    return f"{number(value['mean'])} ± {number((value['high'] - value['low']) / 2)}" if value else ""


def policy_table(
    report: dict[str, Any], condition: str, caption: str = "", interval: Callable[..., str] = interval
) -> Figures:
    """One row a policy, with what was measured at a "split/mode"."""
    reward = reward_of(report)
    rows = []
    for name, parts in report["policies"].items():
        compared = report.get("comparisons", {}).get(name, {}).get(condition, {})
        rows.append((name, parts.get(condition, {}), compared))
    columns: list[tuple[str, str | None, Callable[[dict[str, Any], dict[str, Any]], str]]] = [
        (
            reward["name"],
            "gold reward" if reward["figure"] == "gold" else "reward",
            lambda p, _: interval(p.get(reward["figure"])),
        ),
        ("gain", "gain", lambda _, c: interval(c.get("gain"))),
        ("win rate", "win rate", lambda _, c: interval(c.get("win_rate"))),
        ("gap closed", "gap closed", lambda _, c: _percent(c.get("gap_closed"))),
        ("KL, nats", "KL", lambda p, _: _plain(p.get("kl"), 2)),
        ("proxy", "proxy", lambda p, _: _plain(p.get("proxy"), 2)),
        ("length, tokens", "length", lambda p, _: _plain(p.get("length"), 1)),
        ("truncated", "truncated", lambda p, _: _percent(p.get("truncated"), 1)),
    ]
    made = [Column(title, term, [cell(part, compared) for _, part, compared in rows]) for title, term, cell in columns]
    return _kept(Figures(caption, "policy", [name for name, *_ in rows], made))


def kind_table(report: dict[str, Any], condition: str) -> Figures:
    """Reward by kind of prompt."""
    rows = {name: parts.get(condition, {}).get("by_kind", {}) for name, parts in report["policies"].items()}
    kinds = list(dict.fromkeys(kind for by_kind in rows.values() for kind in by_kind))
    columns = [Column(kind, None, [half_width(by_kind.get(kind)) for by_kind in rows.values()]) for kind in kinds]
    return _kept(
        Figures(
            f"{reward_of(report)['name']} by kind of prompt, ± half of the 95 % interval", "policy", list(rows), columns
        )
    )


def behaviour_table(report: dict[str, Any], condition: str) -> Figures:
    """Share of answers that show each behaviour."""
    rows = {name: parts.get(condition, {}) for name, parts in report["policies"].items()}
    columns = [
        Column(name.replace("_", " "), name.replace("_", " "), [_percent(row.get(name)) for row in rows.values()])
        for name in BEHAVIOURS
    ]
    return _kept(Figures("share of answers by behaviour", "policy", list(rows), columns))


def reward_model_table(report: dict[str, Any]) -> Figures:
    """How well the reward model orders held-out pairs."""
    rows = report.get("reward_model") or {}
    columns = [
        Column("accuracy on labels", "accuracy", [_percent(row.get("accuracy"), 1) for row in rows.values()]),
        Column("best attainable", "best attainable", [_percent(row.get("bayes_accuracy"), 1) for row in rows.values()]),
        Column(
            "accuracy on the gold order",
            "gold order",
            [_percent(row.get("gold_order_accuracy"), 1) for row in rows.values()],
        ),
    ]
    return _kept(Figures("order of held-out pairs", "pairs", [SPLITS.get(name, name) for name in rows], columns))


def best_of_n_table(report: dict[str, Any]) -> Figures:
    """Reward of the answer that the reward model likes best of n."""
    found = report.get("best_of_n") or {}
    columns = [Column(f"n = {n}", None, [interval(value)]) for n, value in found.items()]
    return _kept(
        Figures("best of n samples of the first policy", "", [reward_of(report)["name"]] if found else [], columns)
    )


SPLITS = {"held_out": "held-out", "ood": "out of distribution"}
MODES = {"sampled": "sampled", "greedy": "greedy"}


def condition_title(report: dict[str, Any], condition: str) -> str:
    """A "split/mode" for readers, with the number of prompts and samples where they are known."""
    known = report.get("conditions", {}).get(condition, {})
    split, _, mode = condition.partition("/")
    title = f"{SPLITS.get(split, split)} prompts" + (
        f", {known.get('sampling') or MODES.get(mode, mode)}" if mode else ""
    )
    if known:
        samples = known["samples"]
        title += f" ({known['prompts']:,} prompts, {samples} answer{'s' if samples > 1 else ''} each)"
    return title[0].upper() + title[1:]


def detail_tables(report: dict[str, Any]) -> list[tuple[str, list[Figures]]]:
    """Every table of the page under its heading, without those that have no column."""
    first: dict[str, Any] = next(iter(report.get("policies", {}).values()), {})
    groups = [
        (
            condition_title(report, condition),
            [
                policy_table(report, condition, "policies"),
                kind_table(report, condition),
                behaviour_table(report, condition),
            ],
        )
        for condition in first
    ]
    groups.append(("Reward model", [reward_model_table(report)]))
    groups.append(("Best of n", [best_of_n_table(report)]))
    return [(title, kept) for title, tables in groups if (kept := [table for table in tables if table.columns])]


def terminal_table(report: dict[str, Any]) -> Figures:
    """The main figures of every policy, narrow enough for 80 columns."""
    condition, reward = main_condition(report) or "", reward_of(report)
    caption = f"{reward['name']}; {condition_title(report, condition).lower()}; ± is half of a 95 % interval"
    table = policy_table(report, condition, caption, half_width)
    others: list[Column] = []
    for where, title in (("held_out/greedy", "greedy"), ("ood/sampled", "OOD")):
        values = [parts.get(where, {}).get(reward["figure"]) for parts in report["policies"].values()]
        others.append(Column(title, None, [number(value["mean"]) if value else "" for value in values]))
    kept = [column for column in table.columns if column.title in ("win rate", "gap closed", "KL, nats")]
    first = [column._replace(title="reward") for column in table.columns if column.title == reward["name"]]
    return _kept(table._replace(columns=[*first, *others, *kept]))


def _kept(table: Figures) -> Figures:
    return table._replace(columns=[column for column in table.columns if any(column.cells)])


def _plain(value: float | None, digits: int) -> str:
    return "" if value is None else number(value, digits)


def _percent(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{number(100 * value, digits)} %"
