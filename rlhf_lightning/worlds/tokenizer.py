"""A tokenizer for the world: one token a word, and a chat template that marks what the assistant said."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.worlds.acts import sentences
from rlhf_lightning.worlds.grammar import GREETING, OOD_PHRASING, all_items, render_prompt

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")
MAX_LENGTH = 128

# Written with the space before each token rather than after, so that a prompt is a prefix of prompt and answer.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}
{{- ' <user> ' + message['content'] }}
{%- elif message['role'] == 'assistant' %}
{{- ' <assistant> ' }}
{%- generation %}
{{- message['content'] + ' ' + eos_token }}
{%- endgeneration %}
{%- else %}
{{- raise_exception('this tokenizer knows the roles user and assistant, not ' + message['role']) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- ' <assistant>' }}
{%- endif %}"""


def vocabulary() -> list[str]:
    """The special tokens, then every word of the grammar in alphabetical order: the same list for every seed."""
    prompts = (render_prompt(item, phrasing) for item in all_items() for phrasing in range(OOD_PHRASING + 1))
    words = {word for text in (GREETING, *prompts, *sentences()) for word in text.split()}
    return [*SPECIAL_TOKENS, *sorted(words)]


def world_tokenizer() -> PreTrainedTokenizerFast:
    """The world's word-level tokenizer.

    Text is split at white space and decoded with single spaces; the chat template renders
    ``<bos> <user> prompt <assistant> response <eos>``, further turns alike. It adds no token of its own accord.
    """
    model = WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,  # it would join "red ." to "red."
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
