"""What rows hold that their tokens don't, counted with the rows and logged with counts."""

from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Value

from rlhf_lightning.data.limits import Limit
from rlhf_lightning.data.literal import BREAK
from rlhf_lightning.data.rows import Row
from rlhf_lightning.data.template_inputs import TemplateInputs
from rlhf_lightning.data.turns import Piece

REASONING = ("reasoning_content", "reasoning", "thinking")
ANSWERS = ("completion", "chosen", "rejected")

# Columns of a tokenized row that only counts are made of.
UNREAD_TOOLS, UNREAD_REASONING, TURNS = "unread_tools", "unread_reasoning", "turns"
FEATURES = {name: Value("int32") for name in (UNREAD_TOOLS, UNREAD_REASONING, TURNS)}
LIMITS = (
    Limit(UNREAD_TOOLS, 0, 0, "note", "rows with tools or tool calls that the chat template does not render"),
    Limit(UNREAD_REASONING, 0, 0, "note", "rows with reasoning of an answer that the chat template does not render"),
    Limit(
        TURNS,
        0,
        1,
        "note",
        "single assistant turns of longer conversations, a training row each, rendered as the model is given them when it "
        "generates: the chat template writes earlier turns differently once another follows",
    ),
)


def notes(row: Row, inputs: TemplateInputs, plans: Sequence[Sequence[Piece]]) -> Row:
    """The columns that are counted, of a row and the sequences that it becomes."""
    found: Row = {UNREAD_TOOLS: 0, UNREAD_REASONING: 0, TURNS: len(plans)}
    if inputs.tools is None and not any(len(message) > 2 for message in messages_of(row)):
        return found  # roles and texts alone, as nearly all rows are
    tools, calls, thoughts = tool_names(inputs.tools or ()), called_names(row), reasoning(row)
    if tools or calls or thoughts:
        text = "".join(piece.text for pieces in plans for piece in pieces).replace(BREAK, "")
        found[UNREAD_TOOLS] = int(not all(name in text for name in (*tools, *calls)))
        found[UNREAD_REASONING] = int(not all(thought in text for thought in thoughts))
    return found


def tool_names(tools: Iterable[dict[str, Any]]) -> list[str]:
    """Names of the functions that tools describe, or of calls; those without one are left out."""
    functions = [(tool, tool.get("function")) for tool in tools]
    names = [(inner if isinstance(inner, dict) else tool).get("name") for tool, inner in functions]
    return [name for name in names if isinstance(name, str)]


def messages_of(row: Row, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The messages of every column that holds some."""
    values = [row.get(name) for name in columns or row]
    return [part for value in values if isinstance(value, list) for part in value if isinstance(part, dict)]


def called_names(row: Row) -> list[str]:
    """Names of the functions that the assistant calls."""
    calls = [message.get("tool_calls") for message in messages_of(row) if message.get("role") == "assistant"]
    return tool_names(call for some in calls if isinstance(some, list) for call in some if isinstance(call, dict))


def reasoning(row: Row) -> list[str]:
    """The reasoning of the answers; that of earlier turns is left out, for many templates leave it out on purpose."""
    last = row["messages"][-1:] if isinstance(row.get("messages"), list) else messages_of(row, ANSWERS)
    thoughts = [next((m[name] for name in REASONING if isinstance(m.get(name), str)), "") for m in last]
    return [thought.strip() for thought in thoughts if thought.strip()]
