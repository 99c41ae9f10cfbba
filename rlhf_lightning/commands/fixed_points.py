"""Follow each method to its end with exact expectations, and hold where it ends against what is on record."""

import json
import math
from pathlib import Path

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.fixed_points import Figure, preference_figures, reinforcement_figures, table
from rlhf_lightning.evaluation.tabular import Descent, Problem

REPORT = "fixed_points.json"


def fixed_points(
    one_token: Problem,
    three_tokens: Problem,
    pairs: Problem,
    one_token_descent: Descent = Descent("gradient", 5000, 2.0),  # noqa: B008  (frozen)
    descent: Descent = Descent(),  # noqa: B008  (frozen)
    tolerance: float = 0.2,
    output: str = "runs/ground_truth/fixed_points",
) -> None:
    """Follow each method to its end, exactly, and compare: who finds the optimum, who another point.

    The table goes to the terminal, the figures to ``output``. Exit code 1 if one does not hold.

    Args:
        one_token: Problem of reinforcement learning with responses of one token.
        three_tokens: The same with three.
        pairs: Problem of the losses on preferences.
        one_token_descent: How the first is followed.
        descent: How the others are.
        tolerance: How far a figure may be from the one on record, as a share of it.
        output: Folder of the report; one that is there is replaced.

    Raises:
        UserError: If a problem is not the one that the figures are of.
    """
    for name, problem, length in (("one_token", one_token, 1), ("three_tokens", three_tokens, 3), ("pairs", pairs, 2)):
        if (problem.tokens, problem.length, problem.beta) != (8, length, 0.5):
            raise UserError(
                f"{name}: figures are on record for 8 tokens, length {length} and beta 0.5 alone, not for {problem}"
            )
    figures: list[Figure] = []
    figures += reinforcement_figures(one_token, one_token_descent, 0)
    figures += reinforcement_figures(three_tokens, descent, 1)
    figures += preference_figures(pairs, descent)
    print(table(figures, tolerance))
    wrong = [figure for figure in figures if not figure.holds(tolerance)]
    farthest = max((abs(math.log(ratio)) for figure in figures if (ratio := figure.ratio())), default=0.0)
    print(f"\n{len(figures) - len(wrong)} of {len(figures)} hold; the farthest is off by {math.expm1(farthest):.0%}")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [figure._asdict() | {"holds": figure.holds(tolerance)} for figure in figures]
    (folder / REPORT).write_text(json.dumps(rows, indent=1))
    print(f"report: {folder / REPORT}")
    if wrong:
        raise SystemExit(1)
