"""The first sentence of a report: what was compared, and the result with its interval."""

from typing import Any

MINUS = "\u2212"  # minus sign


def reward_of(report: dict[str, Any]) -> dict[str, str]:
    """What the policies were scored with: its ``name``, and the ``figure`` of report.json that holds it.

    Evaluations of the user's own may leave it out: "gold" is a gold reward, anything else is "score".
    """
    first = main_part(report)
    figure = "gold" if "gold" in first else "score"
    return {"figure": figure, "name": "gold reward" if figure == "gold" else "reward"} | report.get("reward", {})


def main_condition(report: dict[str, Any]) -> str | None:
    """The first "split/mode" at which the policies were measured."""
    first: dict[str, Any] = next(iter(report.get("policies", {}).values()), {})
    return next(iter(first), None)


def main_part(report: dict[str, Any]) -> dict[str, Any]:
    """Figures of the first policy at the main condition."""
    first: dict[str, Any] = next(iter(report.get("policies", {}).values()), {})
    return next(iter(first.values()), {})


def headline(report: dict[str, Any]) -> str | None:
    """One sentence about the policy with the highest reward; None where no policy was measured."""
    condition = main_condition(report)
    if condition is None:
        return None
    reward = reward_of(report)
    rows = {name: parts[condition] for name, parts in report["policies"].items() if condition in parts}
    scores = {name: row[reward["figure"]]["mean"] for name, row in rows.items() if reward["figure"] in row}
    if not scores:
        return None
    base, *others = scores
    prompts = report.get("conditions", {}).get(condition, {}).get("prompts")
    where = f"on {prompts:,} held-out prompts" if prompts else "on held-out prompts"
    if not others:
        return f"{base} has a {reward['name']} of {_with_interval(rows[base][reward['figure']])} {where}."
    best = max(others, key=lambda name: scores[name])
    compared = report.get("comparisons", {}).get(best, {}).get(condition, {})
    sentence = _change(best, base, reward["name"], scores[base], rows[best][reward["figure"]], compared.get("gain"))
    if "kl" in rows[best]:
        sentence += f" at a KL of {number(rows[best]['kl'], 1)} nats"
    if won := compared.get("win_rate"):
        sentence += f", winning {percent(won)} of comparisons with {base}"
    if len(others) > 1:
        sentence += f", {where}. It has the highest mean of the {len(others)} policies compared with {base}."
        return sentence
    return f"{sentence}, {where}."


def _change(
    name: str, base: str, reward: str, before: float, after: dict[str, float], gain: dict[str, float] | None
) -> str:
    from_to = f"from {number(before)} ({base}) to {_with_interval(after)}"
    if gain is None:
        return f"With {name} the {reward} went {from_to}"
    if gain["low"] > 0:
        return f"{name} raised the {reward} {from_to}"
    if gain["high"] < 0:
        return f"{name} lowered the {reward} {from_to}"
    return (
        f"{name} did not change the {reward} measurably ({number(before)} with {base}, {number(after['mean'])} with {name}; "
        f"95 % interval of the difference {number(gain['low'])} to {number(gain['high'])})"
    )


def _with_interval(value: dict[str, float]) -> str:
    return f"{number(value['mean'])} (95 % interval {number(value['low'])} to {number(value['high'])})"


def percent(value: dict[str, float]) -> str:
    """A share with its interval."""
    return f"{100 * value['mean']:.0f} % ({100 * value['low']:.0f} to {100 * value['high']:.0f} %)"


def number(value: float, digits: int = 2) -> str:
    """A number as in print; no negative zero."""
    shown = f"{value:,.{digits}f}"
    return shown.replace("-", "" if not float(shown.replace(",", "")) else MINUS)
