"""Which ``columns`` mapping would make a table readable: what the error about an unknown format shows."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rlhf_lightning.data.columns import ColumnMap, as_yaml
from rlhf_lightning.data.messages import likely_keys, read_role
from rlhf_lightning.data.nested import NESTED, decode_cell
from rlhf_lightning.data.rows import Row
from rlhf_lightning.data.sources import Kind
from rlhf_lightning.errors import UserError

if TYPE_CHECKING:
    from rlhf_lightning.data.format_table import Format

SHOWN_COLUMNS = 12
LONGEST_NAME = 40

# Other names under which files have the columns of the formats, the likeliest first.
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "prompt": (
        "question",
        "query",
        "instruction",
        "problem",
        "input",
        "user",
        "human",
        "request",
        "post",
        "article",
    ),
    "completion": (
        "answer",
        "response",
        "output",
        "reply",
        "solution",
        "target",
        "summary",
        "assistant",
        "generation",
        "code",
    ),
    "instruction": ("question", "query", "prompt", "problem", "task", "request", "user"),
    "input": ("context", "passage", "document", "article", "background", "inputs"),
    "output": ("response", "answer", "completion", "reply", "solution", "target", "assistant"),
    "system": ("system_prompt", "system_message", "persona"),
    "chosen": ("preferred", "accepted", "winner", "better", "good", "positive", "chosen_response", "answer_chosen"),
    "rejected": ("dispreferred", "loser", "worse", "bad", "negative", "rejected_response", "answer_rejected"),
    "messages": ("conversation", "conversations", "dialogue", "dialog", "chat", "turns", "history"),
    "conversations": ("conversation", "dialogue", "dialog", "chat", "turns"),
    "text": ("content", "story", "document", "article", "body", "raw_content"),
    "label": ("liked", "is_liked", "good", "thumbs_up", "feedback", "kto_tag", "is_chosen", "desirable"),
    "kto_tag": ("label", "liked", "is_liked", "thumbs_up", "desirable"),
    "completions": ("responses", "answers", "outputs", "candidates", "steps", "generations"),
    "ranks": ("rank", "rankings"),
    "ranking": ("order", "ordering"),
    "labels": ("step_labels", "correct"),
    "ratings": ("step_ratings", "scores"),
}
# What a table of texts most likely is, in the order of its columns.
GUESSES: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "demonstrations": (("prompt", "completion"), ("text",)),
    "preferences": (("prompt", "chosen", "rejected"),),
    "prompts": (("prompt",),),
    "unpaired": (("prompt", "completion", "label"),),
    "rankings": (("prompt", "completions", "ranks"),),
    "stepwise": (("prompt", "completions", "labels"),),
}


# A format that does not read such a column most likely reads part of the prompt only.
PROMPT_LIKE = {
    *(
        "prompt",
        "question",
        "query",
        "instruction",
        "instructions",
        "problem",
        "user",
        "user_input",
        "user_prompt",
        "human",
    ),
    *("system", "system_prompt", "system_message", "context", "input", "inputs", "history", "chat_history", "passage"),
    *("document", "messages", "conversation", "conversations", "dialogue", "dialog"),
}
MEDIA = {
    *("image", "images", "image_path", "image_paths", "image_url", "picture", "pictures", "pixel_values", "pil_image"),
    *("audio", "audios", "audio_path", "speech", "sound", "video", "videos", "video_path", "frames"),
}


@dataclass
class Suggestion:
    """A format and the columns that it would read.

    Attributes:
        format: The format.
        names: The file's column for each that the format has and the file does not.
        matched: How many columns of the format are there, renamed or not.
        missing: Columns that the format needs and nothing looks like.
        used: Columns of the file that it would read.
        lost: How many columns that look like part of the prompt it would not read.
    """

    format: "Format"
    names: dict[str, str] = field(default_factory=dict)
    matched: int = 0
    missing: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    lost: int = 0


def assign(known: "Format", row: Row) -> Suggestion:
    """Look for the columns of a format among those of a row: first under their names, then under others."""
    found = Suggestion(known)
    places: dict[str, str] = {}
    for wanted in (known.columns, known.optional):  # what it needs has the first choice
        places |= {column: column for column in wanted if column in row and column not in places.values()}
        for names_of in (other_names, words_of_own_name, words_of_other_names):
            for column in wanted:
                if column in places or (column == "system" and text_prompt(places, row)):
                    continue
                taken = (*known.columns, *places.values())
                names = (name for name in names_of(column, row) if name not in taken and holds(column, row[name]))
                if (name := next(names, None)) is not None:
                    places[column] = name
    if text_prompt(places, row) and "prompt" in known.columns:
        places.pop("system", None)  # a prompt that is text takes no system prompt
    found.names = {column: name for column, name in places.items() if column != name}
    found.matched = sum(column in places for column in known.columns)
    found.missing = [column for column in known.columns if column not in places]
    found.used = set(places.values())
    found.lost = sum(fold(name) in PROMPT_LIKE and name not in found.used for name, value in row.items() if value)
    return found


def fold(name: str) -> str:
    """A column's name as it is looked up."""
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def text_prompt(places: dict[str, str], row: Row) -> bool:
    """Whether a column of text is taken for the prompt."""
    return isinstance(row.get(places.get("prompt", "")), str)


def other_names(column: str, row: Row) -> Iterator[str]:
    """Columns of the row with another name of a format's column, the likeliest first."""
    folded = {re.sub(r"[^a-z0-9]+", "_", name.strip().lower()): name for name in row}
    for other in (column, *OTHER_NAMES.get(column, ())):
        if other in folded:
            yield folded[other]


def words_of_own_name(column: str, row: Row) -> Iterator[str]:
    """Columns of the row whose name has the name of a format's column in it."""
    return (name for name in row if column in words(name))


def words_of_other_names(column: str, row: Row) -> Iterator[str]:
    """Columns of the row whose name has another name of a format's column in it."""
    return (name for other in OTHER_NAMES.get(column, ()) for name in row if other in words(name))


def words(name: str) -> list[str]:
    """The words of a column's name: "Best Answer" and "best_answer1" are "best" and "answer". A sentence is no name."""
    found = re.findall(r"[a-z]+", name.lower())
    return found if len(found) <= 4 else []


def holds(column: str, value: Any) -> bool:
    """Whether a value of a row may be that of a format's column: lists where lists belong, text where text does."""
    value = decode_cell(column, value)
    if column in NESTED:
        return isinstance(value, list)
    if column in ("label", "kto_tag"):
        return isinstance(value, bool) or value in (0, 1)
    return value is None or isinstance(value, str | list)


def distance(one: Suggestion) -> tuple[int, ...]:
    """Sorts suggestions, the nearest first; formats that only certain rows are in come after others."""
    special = one.format.marks.__name__ != "anything"
    return len(one.missing), int(special), one.lost, -one.matched, len(one.names), -len(one.used)


def is_mapping(one: Suggestion) -> bool:
    """Whether columns can be renamed so that the format reads them."""
    return bool(one.names) and not one.missing and one.format.marks.__name__ == "anything"


def suggestions(formats: Sequence["Format"], row: Row, kind: Kind) -> list[Suggestion]:
    """The formats that serve a kind, the nearest to a row first."""
    found = [assign(known, row) for known in formats if kind in known.serves]
    return sorted(found, key=distance)


def unknown_format(formats: Sequence["Format"], row: Row, kind: Kind, given: ColumnMap) -> UserError:
    """The error about columns that fit no format: the three nearest, and the mapping that would make one fit."""
    found = suggestions(formats, row, kind)
    nearest = "; ".join(f"{one.format.name} ({', '.join(one.format.columns)})" for one in found[:3])
    columns = [name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..." for name in map(str, row)]
    more = f" and {len(columns) - SHOWN_COLUMNS} more" if len(columns) > SHOWN_COLUMNS else ""
    mapping = complete_mapping(found, row, kind)
    advice = f"no column of the file looks like {', '.join(found[0].missing) or 'those'}"
    if mapping:
        advice = f"to read them: data.columns: {as_yaml(given.extended(mapping))}"
    return UserError(
        f"unknown format: found columns {', '.join(columns[:SHOWN_COLUMNS]) or '(none)'}{more}",
        f"the nearest formats for {kind}: {nearest}",
        advice,
    )


def complete_mapping(found: list[Suggestion], row: Row, kind: Kind) -> dict[str, Any] | None:
    """The mapping of the nearest format that is complete, else a guess by the order of the columns."""
    whole = next(filter(is_mapping, found), None)
    if whole is not None:
        return {**whole.names, **spelling(row, whole)}
    conversation = next((name for name, value in row.items() if is_message_list(decode_cell("messages", value))), None)
    if conversation is not None and kind in ("demonstrations", "prompts"):
        return {"messages": conversation, **message_keys(decode_cell("messages", row[conversation]))}
    for guess in GUESSES[kind]:
        partly = assign(replace(found[0].format, columns=guess, optional=()), row)
        for column in partly.missing:
            free = (
                name for name in row if name not in (*partly.used, *partly.names.values()) and fits(column, row[name])
            )
            if (name := next(free, None)) is not None:
                partly.names[column] = name
        if all(column in partly.names or column in row for column in guess):
            return partly.names
    return None


def fits(column: str, value: Any) -> bool:
    """As :func:`holds`, but null is no hint."""
    return value is not None and holds(column, value)


def spelling(row: Row, found: Suggestion) -> dict[str, Any]:
    """The keys of the messages that the format would read, where they are spelt otherwise."""
    for column in ("messages", "conversations"):
        value = decode_cell(column, row.get(found.names.get(column, column)))
        if column in found.format.columns and is_message_list(value):
            return message_keys(value)
    return {}


def is_message_list(value: Any) -> bool:
    """Whether it is a list of objects with at least two texts each."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, dict) and sum(isinstance(v, str) for v in part.values()) >= 2 for part in value)
    )


def message_keys(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The keys and role names of messages, where they are not the usual ones."""
    role, content = likely_keys(messages)
    keys: dict[str, Any] = {}
    if role not in ("role", "from", None):
        keys["role"] = role
    if content not in ("content", "value", None):
        keys["content"] = content
    speakers = dict.fromkeys(message[role] for message in messages) if role is not None else {}
    unknown = [name for name in speakers if read_role(name) is None]
    if unknown:
        known = {read_role(name) for name in speakers}
        free = [name for name in ("user", "assistant") if name not in known]
        keys["roles"] = {
            name: free[min(place, len(free) - 1)] if free else "user" for place, name in enumerate(unknown)
        }
    return keys
