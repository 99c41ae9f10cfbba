"""Chat templates: from messages, tools and variables to text."""

import logging
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

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
        self._tools = None if inputs.tools is None else literal_leaves(inputs.tools, self._control)
        own: dict[str, Any] = {} if not inputs.variables else literal_leaves(dict(inputs.variables), self._control)
        self._variables = {**tokenizer.special_tokens_map, **default_variables(tokenizer), **own}

    @property
    def marks_answers(self) -> bool:
        return bool(GENERATION.search(self._template))

    @property
    def rewrites_answers(self) -> bool:
        """Whether the template writes an answer with reasoning differently once another turn follows; looked up once."""
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
        try:
            rendered: Any = render_jinja_template(
                conversations=[[self._speakable(message) for message in messages]],
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
        others = {
            name: literal_leaves(value, self._control)
            for name, value in message.items()
            if value is not None and name not in ("role", "content", MASKED)
        }
        return {"role": role, "content": spoken, **others}
