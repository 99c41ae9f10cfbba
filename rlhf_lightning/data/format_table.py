"""The table of row formats, and which of them a dataset is in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf_lightning.data import ranked, readers
from rlhf_lightning.data.annotations import ANNOTATIONS
from rlhf_lightning.data.columns import AS_THEY_ARE, ColumnMap
from rlhf_lightning.data.messages import is_hh
from rlhf_lightning.data.nested import decode_cell
from rlhf_lightning.data.rows import WEIGHT, Example, Row
from rlhf_lightning.data.sources import Kind
from rlhf_lightning.data.suggestions import is_mapping, suggestions, unknown_format
from rlhf_lightning.errors import UserError


def anything(row: Row) -> bool:
    """True for every row."""
    return True


@dataclass(frozen=True)
class Format:
    """A way to write rows.

    Attributes:
        name: What the log and the ``format`` argument call it.
        columns: Columns that it needs.
        read: Reads a row.
        serves: What its rows can be used for.
        optional: Columns that it uses where they are there.
        marks: Tells it, by the first row, from another format with the same columns.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], Example]
    serves: tuple[Kind, ...]
    optional: tuple[str, ...] = ()
    marks: Callable[[Row], bool] = anything


ALPACA_OPTIONAL = ("input", "system", "history")
SYSTEM = ("system",)
# The columns of each kind: a row's own of that name give way to them.
CANONICAL: dict[Kind, tuple[str, ...]] = {
    "demonstrations": ("text", "messages", "prompt", "completion"),
    "preferences": ("prompt", "chosen", "rejected"),
    "prompts": ("prompt",),
    "rankings": ("prompt", "completions", "ranks"),
    "unpaired": ("prompt", "completion", "label"),
    "stepwise": ("prompt", "completions", "labels"),
}
# Columns beside those of the format that tokenization reads.
BESIDE: dict[Kind, tuple[str, ...]] = {
    "demonstrations": (WEIGHT, "completion_truncated"),
    "preferences": ("margin", "chosen_truncated", "rejected_truncated", *ANNOTATIONS["preferences"]),
    "prompts": (),
    "rankings": ANNOTATIONS["rankings"],
    "unpaired": ("completion_truncated", "chosen_truncated", "rejected_truncated"),
    "stepwise": (),
}
TEMPLATE = ("tools", "chat_template_kwargs")  # what chat templates take beside messages

# What rows can be used for.
ANSWERS: tuple[Kind, ...] = ("demonstrations", "prompts")
PAIRS: tuple[Kind, ...] = ("preferences", "demonstrations", "unpaired", "rankings", "prompts")
RANKINGS: tuple[Kind, ...] = ("rankings", "preferences", "demonstrations", "prompts")
STEPS: tuple[Kind, ...] = ("stepwise", "demonstrations", "unpaired", "prompts")
LABELS: tuple[Kind, ...] = ("unpaired", "demonstrations", "prompts")

# The first that fits is taken, so those with more columns come first.
FORMATS = (
    Format("sharegpt-preference", ("conversations", "chosen", "rejected"), readers.sharegpt_preference, PAIRS, SYSTEM),
    Format("preference", ("prompt", "chosen", "rejected"), readers.preference, PAIRS, SYSTEM),
    Format(
        "alpaca-preference",
        ("instruction", "chosen", "rejected"),
        readers.alpaca_preference,
        PAIRS,
        (*ALPACA_OPTIONAL, "output"),
    ),
    Format(
        "messages-preference",
        ("messages", "chosen", "rejected"),
        readers.messages_preference,
        PAIRS,
        SYSTEM,
        marks=readers.ends_with_question,
    ),
    Format("hh-rlhf", ("chosen", "rejected"), readers.hh_preference, PAIRS, marks=lambda row: is_hh(row["chosen"])),
    Format("implicit-preference", ("chosen", "rejected"), readers.implicit_preference, PAIRS, SYSTEM),
    Format("swift-preference", ("messages", "rejected_response"), readers.swift_preference, PAIRS, SYSTEM),
    Format("swift-pairs", ("messages", "rejected_messages"), readers.swift_messages_preference, PAIRS, SYSTEM),
    Format(
        "openai-preference", ("input", "preferred_output", "non_preferred_output"), readers.openai_preference, PAIRS
    ),
    Format("ranking", ("prompt", "completions", "ranks"), ranked.ranking, RANKINGS, SYSTEM),
    Format("ordering", ("prompt", "completions", "ranking"), ranked.ordering, RANKINGS, SYSTEM),
    Format("nemo-ranking", ("context", "completions"), ranked.nemo_ranking, RANKINGS, marks=ranked.has_rank_objects),
    Format("stepwise", ("prompt", "completions", "labels"), readers.stepwise, STEPS, SYSTEM),
    Format("stepwise-ratings", ("prompt", "completions", "ratings"), readers.stepwise_ratings, STEPS, SYSTEM),
    Format("prm800k", ("question", "label"), readers.prm800k, STEPS, marks=lambda row: isinstance(row["label"], dict)),
    Format("unpaired-preference", ("prompt", "completion", "label"), readers.unpaired, LABELS, SYSTEM),
    Format("prompt-completion", ("prompt", "completion"), readers.prompt_completion, ANSWERS, SYSTEM),
    Format("labelled-messages", ("messages", "label"), readers.labelled_messages, LABELS, SYSTEM),
    Format("labelled-sharegpt", ("conversations", "kto_tag"), readers.labelled_sharegpt, LABELS, SYSTEM),
    Format("labelled-alpaca", ("instruction", "output", "kto_tag"), readers.labelled_alpaca, LABELS, ALPACA_OPTIONAL),
    Format("alpaca", ("instruction", "output"), readers.alpaca, ANSWERS, ALPACA_OPTIONAL),
    Format("messages", ("messages",), readers.messages, ANSWERS, SYSTEM),
    Format("sharegpt", ("conversations",), readers.sharegpt, ANSWERS, SYSTEM),
    Format("prompt-only", ("prompt",), readers.prompt_only, ("prompts",), SYSTEM),
    Format("alpaca-prompt", ("instruction",), readers.alpaca_question, ("prompts",), ALPACA_OPTIONAL),
    Format("hh-rlhf-text", ("text",), readers.hh_text, ANSWERS, marks=lambda row: is_hh(row["text"])),
    Format("text", ("text",), readers.text, ("demonstrations",)),
)
READ = {column for known in FORMATS for column in (*known.columns, *known.optional)}


def detect_format(
    columns: Sequence[str], first_row: Row, kind: Kind | None = None, given: ColumnMap = AS_THEY_ARE
) -> Format:
    """The format of rows with these columns.

    Args:
        columns: Names of the columns.
        first_row: Tells apart formats with the same columns.
        kind: What the rows are wanted for: formats that serve it come first.
        given: The mapping of columns: formats that use what it names come first.

    Raises:
        UserError: If none fits; lists the columns found, the nearest formats and the mapping that would help.
    """
    row = {name: decode_cell(name, value) for name, value in first_row.items()}
    fitting = [known for known in FORMATS if set(known.columns) <= set(columns) and known.marks(row)]
    named = [known for known in fitting if given.names.keys() & READ <= {*known.columns, *known.optional}]
    serving = [known for known in named or fitting if kind is None or kind in known.serves]
    if serving:
        return serving[0]
    row = {name: row.get(name) for name in columns}  # of the columns that are there, whatever else the row holds
    mapped = kind is not None and any(map(is_mapping, suggestions(FORMATS, row, kind)))
    if fitting and not mapped:
        return fitting[0]  # its reader says what the rows lack
    raise unknown_format(FORMATS, row, kind or "demonstrations", given)


def find_format(name: str) -> Format:
    """The format of that name.

    Raises:
        UserError: If there is none.
    """
    for known in FORMATS:
        if known.name == name:
            return known
    raise UserError(f"unknown format '{name}'; known: {', '.join(known.name for known in FORMATS)}")
