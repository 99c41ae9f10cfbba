"""What annotators say of a comparison beside which answer is the better one: how sure they are, and how much they count."""

import math

from rlhf_lightning.data.rows import WEIGHT, Row, read_weight
from rlhf_lightning.data.sources import Kind
from rlhf_lightning.errors import UserError

LARGEST_MARGIN = 3.4028234663852886e38  # of float32

# The columns that are read beside those of a format, by kind.
ANNOTATIONS: dict[Kind, tuple[str, ...]] = {
    "preferences": (WEIGHT, "chosen_probability", "tie"),
    "rankings": (WEIGHT,),
}


def annotations(row: Row, kind: Kind) -> Row:
    """The canonical columns of what is said: ``weight``, and of pairs ``chosen_probability``, where the row has any of it.

    Raises:
        UserError: If it is no weight, or no probability.
    """
    given = [name for name in ANNOTATIONS.get(kind, ()) if name in row]
    said: Row = {}
    if WEIGHT in given:
        said[WEIGHT] = read_weight(row)
    if "chosen_probability" in given or "tie" in given:
        said["chosen_probability"] = read_probability(row)
    return said


def read_probability(row: Row) -> float:
    """How likely the chosen answer is the better one: 1/2 of a tie, 1 where nothing is said.

    Raises:
        UserError: If it is no probability, or a tie has another.
    """
    probability, tie = row.get("chosen_probability"), row.get("tie")
    if tie not in (None, True, False):
        raise UserError(f"column 'tie' is {tie!r:.40}; it must be true or false")
    if probability is None:
        return 0.5 if tie else 1.0
    if not is_number(probability) or not 0 <= probability <= 1:
        raise UserError(f"column 'chosen_probability' is {probability!r:.40}; it must be in [0, 1]")
    if tie and probability != 0.5:
        raise UserError(f"column 'chosen_probability' is {probability!r:.40} where 'tie' is true; a tie is 0.5")
    return float(probability)


def read_margin(row: Row) -> float:
    """How much better the chosen side was judged; 0 where the column is absent or null.

    Raises:
        UserError: If it is no number.
    """
    margin = row.get("margin")
    if margin is None:
        return 0.0
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not abs(margin) <= LARGEST_MARGIN:
        raise UserError(f"column 'margin' is {margin!r:.40}; it must be a finite number")
    return float(margin)


def is_number(value: object) -> bool:
    """Whether it is a finite number, true and false not counted."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
