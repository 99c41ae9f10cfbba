"""Chat templates: from messages, tools and variables to text."""

import copy
import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from rlhf_lightning.data.literal import control_tokens, literal, literal_leaves, without_eos
from rlhf_lightning.data.loss_flags import MASKED
from rlhf_lightning.data.messages import Message
from rlhf_lightning.data.template_inputs import NOTHING, TemplateInputs, default_variables
from rlhf_lightning.errors import UserError

log = logging.getLogger(__name__)

# Headers are ordinary text, so any vocabulary can spell them; a turn of the assistant ends with EOS and no other does.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE, OTHER_PROBE = ({"role": "assistant", "content": character} for character in "\ufdd2\ufdd3")
QUESTION = {"role": "user", "content": "\ufdd2"}

_REWRITES: dict[tuple, bool] = {}  # by template and variables


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give the tokenizer a plain chat template where it has none; True if it was given one."""
    if tokenizer.chat_template:
        return False
    log.warning("the tokenizer has no chat template; using plain 'User:' and 'Assistant:' headers")
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    return True


def eos_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The end-of-sequence token.

    Raises:
        UserError: If there is none: nothing would teach the model to stop.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, so no response could end; set tokenizer.eos_token")
    return str(tokenizer.eos_token)


@lru_cache(maxsize=16)
def compiled(template: str) -> Template:
    """The template as transformers compiles it.

    Its globals are a plain dictionary: Jinja copies them twice a rendering, and a chain of mappings is slow to copy.
    """
    made = _compile_jinja_template(template)
    environment = made.environment
    return environment.template_class.from_code(environment, environment.compile(template), dict(made.globals))


def is_plain(value: Any) -> bool:
    """Whether a value is made of JSON's types alone, which transformers gives to a template as they are."""
    if isinstance(value, dict):
        return type(value) is dict and all(map(is_plain, value.keys())) and all(map(is_plain, value.values()))
    if isinstance(value, list):
        return type(value) is list and all(map(is_plain, value))
    return value is None or type(value) in (str, int, float, bool)


def is_text_alone(message: Message) -> bool:
    """Whether a message is a role and a text, and nothing else."""
    return len(message) == 2 and type(message["role"]) is str and type(message["content"]) is str


class Renderer:
    """A chat template with the tools and variables of one row.

    The texts that it returns may hold breaks, see :mod:`.literal`.

    Attributes:
        eos: The end-of-sequence token.
        markers: Tokens that only the template may write into a turn, see :func:`.turn_markers`.
        marks_answers: Whether the template says with ``{% generation %}`` what the assistant said.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, inputs: TemplateInputs = NOTHING) -> None:
        """Raises UserError if the tokenizer has no chat template, or no EOS."""
        if not tokenizer.chat_template:
            raise UserError(
                "the rows are conversations and the tokenizer has no chat template; set tokenizer.chat_template"
            )
        control = control_tokens(tokenizer)
        self.eos, self.markers, self._control = eos_token(tokenizer), control.turns, control.all
        self._template = tokenizer.get_chat_template(None, inputs.tools)
        self.marks_answers = bool(GENERATION.search(self._template))
        self._shared = {**tokenizer.special_tokens_map, **default_variables(tokenizer)}
        self._take(inputs)

    def _take(self, inputs: TemplateInputs) -> None:
        tools, variables = inputs
        self._tools = None if tools is None else literal_leaves(tools, self._control)
        own: dict[str, Any] = literal_leaves(dict(variables), self._control) if variables else {}
        self._variables = {**self._shared, **own}
        self._plain = tools is None and is_plain(self._variables) and "documents" not in self._variables
        self._rewrites: bool | None = None

    def given(self, inputs: TemplateInputs) -> "Renderer":
        """The same template with other variables, and with other tools where it has tools."""
        if inputs is NOTHING:
            return self
        other = copy.copy(self)
        other._take(inputs)
        return other

    @property
    def rewrites_answers(self) -> bool:
        """Whether the template writes an answer with reasoning differently once another turn follows; looked up once."""
        if self._rewrites is None:
            self._rewrites = self._find_rewrites()
        return self._rewrites

    def _find_rewrites(self) -> bool:
        key = (self._template, repr(self._variables), self._tools is None)
        if key not in _REWRITES:
            thought = {"role": "assistant", "content": "<think>\na\n</think>\n\nb", "reasoning_content": "a"}
            try:
                alone, both = self.text([QUESTION, thought]), self.text([QUESTION, thought, QUESTION, thought])
                _REWRITES[key] = not both.startswith(alone.rstrip())
            except UserError:  # rows will tell
                _REWRITES[key] = True
        return _REWRITES[key]

    @property
    def has_clock(self) -> bool:
        """Whether the text may depend on when it is rendered."""
        return "strftime_now" in self._template

    def text(self, messages: Sequence[Message], *, generation_prompt: bool = False, unfinished: bool = False) -> str:
        """The text of a conversation.

        Args:
            messages: The conversation.
            generation_prompt: Whether the beginning of the assistant's next turn follows it.
            unfinished: Whether it ends with what the last message says, to be continued.

        Raises:
            UserError: If the template refuses the conversation.
        """
        return self._render(messages, add_generation_prompt=generation_prompt, continue_final_message=unfinished)[0]

    def marked(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the places that a template with ``{% generation %}`` marks in it."""
        text, spans = self._render(messages, return_assistant_tokens_mask=True)
        return text, [(start, end) for start, end in spans]

    def _render(self, messages: Sequence[Message], **settings: Any) -> tuple[str, Any]:
        spoken = [self._speakable(message) for message in messages]
        plain = self._plain and all(map(is_text_alone, spoken))
        try:
            if plain and not (settings.get("continue_final_message") or settings.get("return_assistant_tokens_mask")):
                # What transformers would do before and after is nothing here, and takes twice as long as the template.
                given = {"add_generation_prompt": settings["add_generation_prompt"], "tools": None, "documents": None}
                return compiled(self._template).render(self._variables, messages=spoken, **given), []
            rendered: Any = render_jinja_template(
                conversations=[spoken],
                tools=self._tools,
                chat_template=self._template,
                **settings,
                **self._variables,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:  # what templates run into
            roles = ", ".join(message["role"] for message in messages) or "no message"
            reason = next(iter(str(error).splitlines()), "")
            raise UserError(f"the chat template refuses a conversation of {roles}: {reason}") from error
        texts, spans = rendered
        return texts[0], spans[0] if spans else []

    def _speakable(self, message: Message) -> Message:
        """A message as templates take it: no nulls, and no text that can end or begin a turn."""
        role, content = message["role"], str(message["content"] or "")
        if role == "assistant":
            spoken = literal(without_eos(content, self.eos), self.markers)
        else:
            spoken = literal(content, self._control)
        if len(message) == 2:
            return {"role": role, "content": spoken}
        others = {
            name: literal_leaves(value, self._control)
            for name, value in message.items()
            if value is not None and name not in ("role", "content", MASKED)
        }
        return {"role": role, "content": spoken, **others}
