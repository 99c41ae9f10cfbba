"""What a chat template receives beside the messages: the tools of a row, and the variables of ``chat_template_kwargs``."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import TemplateSyntaxError, meta
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from rlhf_lightning.data.tool_calls import with_objects
from rlhf_lightning.errors import UserError

Tools = list[dict[str, Any]] | None
Variables = Mapping[str, Any] | None

KWARGS = "chat_template_kwargs"  # the name of the column, of the setting, and in tokenizer_config.json
TEMPLATE_COLUMNS = ("tools", KWARGS)
# Rendering sets these itself.
RESERVED = (
    "messages",
    "conversations",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "return_assistant_tokens_mask",
)


class TemplateInputs(NamedTuple):
    """Tools and variables of one row.

    Attributes:
        tools: JSON schemas; None for none.
        variables: Variables of the chat template; None for the tokenizer's own alone.
    """

    tools: Tools = None
    variables: Variables = None


NOTHING = TemplateInputs()


def inputs_of(row: Mapping[str, Any]) -> TemplateInputs:
    """The columns ``tools`` and ``chat_template_kwargs`` of a row.

    Raises:
        UserError: See :func:`tools_of` and :func:`variables_of`.
    """
    if row.get("tools") is None and row.get(KWARGS) is None:
        return NOTHING
    return TemplateInputs(tools_of(row), variables_of(row))


def inputs_of_columns(columns: Mapping[str, Sequence[Any]], count: int) -> list[TemplateInputs]:
    """The columns ``tools`` and ``chat_template_kwargs`` of ``count`` rows, either of which may be absent."""
    given = {name: columns[name] for name in TEMPLATE_COLUMNS if name in columns}
    return [inputs_of({name: values[row] for name, values in given.items()}) for row in range(count)]


def tools_of(row: Mapping[str, Any]) -> Tools:
    """The tools of a row: a list of JSON schemas, also written as text.

    Raises:
        UserError: If it is no list of objects, or the text not one in JSON.
    """
    tools = parsed(row.get("tools"), "tools")
    if isinstance(tools, list):
        tools = [with_objects(tool, "parameters") for tool in tools]
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError(f"column 'tools' holds {tools!r:.60} where a list of JSON schemas belongs")
    return tools


def variables_of(row: Mapping[str, Any]) -> Variables:
    """The variables that a row sets for its chat template: an object, also written as JSON text; nulls set nothing.

    Raises:
        UserError: If it is no object, or sets a variable that rendering sets itself.
    """
    variables = parsed(row.get(KWARGS), KWARGS)
    return None if variables is None else checked(variables, f"column '{KWARGS}'")


def parsed(value: Any, column: str) -> Any:
    """A value, or the one that its JSON text holds; None where it is empty."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"column '{column}' is not JSON: {error}") from error
    return value or None


def checked(variables: Any, place: str) -> dict[str, Any]:
    """Variables without those that are null.

    Raises:
        UserError: If it is no object, or sets a variable that rendering sets itself.
    """
    if not isinstance(variables, Mapping):
        raise UserError(f"{place} holds {variables!r:.60} where an object of template variables belongs")
    if taken := [name for name in RESERVED if variables.get(name) is not None]:
        raise UserError(f"{place} sets '{taken[0]}', which rendering sets itself; leave it out")
    return {str(name): value for name, value in variables.items() if value is not None}


def default_variables(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The variables that every rendering with this tokenizer sets."""
    return dict(tokenizer.init_kwargs.get(KWARGS) or {})


def set_default_variables(tokenizer: PreTrainedTokenizerBase, variables: Variables) -> None:
    """Let every rendering with this tokenizer set these variables; they are saved with it, so that later stages agree.

    Args:
        tokenizer: Of the data or the policy; has a chat template.
        variables: Values by name; None leaves those that the tokenizer was saved with.

    Raises:
        UserError: If the template reads no variable of such a name.
    """
    if variables is None:
        return
    chosen = checked(variables, KWARGS)
    known = sorted(set().union(*map(template_variables, templates_of(tokenizer))) - set(RESERVED))
    if unknown := [name for name in chosen if name not in known]:
        raise UserError(
            f"{KWARGS} sets '{unknown[0]}', which the chat template does not read; it reads {', '.join(known) or 'none'}"
        )
    tokenizer.init_kwargs[KWARGS] = chosen


def templates_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The source of every chat template of a tokenizer: some have several by name."""
    template: Any = tokenizer.chat_template
    return list(template.values()) if isinstance(template, dict) else [template] if template else []


@lru_cache(maxsize=16)
def template_variables(template: str) -> frozenset[str]:
    """Names that a template reads and does not set itself; none if it can't be parsed."""
    try:
        environment = _compile_jinja_template(template).environment
        return frozenset(meta.find_undeclared_variables(environment.parse(template)))
    except TemplateSyntaxError:  # rendering will say so
        return frozenset()
