"""Chat templates that behave as those of released models do, a tokenizer for them, and conversations to render."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EOS, PAD = "<|im_end|>", "<|endoftext|>"

# The whole of a turn as ChatML writes it, with tool calls; "content" is what stands for what is said.
TURN = (
    "{{ '<|im_start|>' + m.role + '\n' }}%s"
    "{%% if m.tool_calls %%}{%% for c in m.tool_calls %%}"
    "{{ '<tool_call>' }}{{ c.function | tojson }}{{ '</tool_call>' }}{%% endfor %%}{%% endif %%}{{ '<|im_end|>\n' }}"
)
TOOLS = "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
LOOP, END = "{% for m in messages %}", "{% endfor %}"
GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
THINKING = "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}"
LAST_ANSWER = "m.role == 'assistant' and loop.last"

TEMPLATES = {
    "strips reasoning": TOOLS
    + LOOP
    + TURN % ("{% if m.reasoning_content and " + LAST_ANSWER + " %}" + THINKING + "{% endif %}{{ m.content }}")
    + END
    + GENERATION,
    "empty think block": TOOLS
    + LOOP
    + TURN % ("{% if " + LAST_ANSWER + " %}" + THINKING + "{% endif %}{{ m.content }}")
    + END
    + GENERATION,
    "opens think": TOOLS
    + LOOP
    + TURN % ("{% if m.reasoning_content and " + LAST_ANSWER + " %}" + THINKING + "{% endif %}{{ m.content }}")
    + END
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
    "EOS at the end": TOOLS
    + LOOP
    + "{{ '## ' + m.role + '\n' + m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '\n' }}"
    + END
    + "{% if add_generation_prompt %}{{ '## assistant\n' }}{% else %}{{ eos_token }}{% endif %}",
    "no system": "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + TOOLS
    + LOOP
    + TURN % "{{ m.content }}"
    + END
    + GENERATION,
    "folds system": TOOLS
    + "{% set ns = namespace(system='') %}"
    + LOOP
    + "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}{% else %}"
    + TURN % "{{ (ns.system if m.role == 'user' and loop.index0 == 1 else '') + m.content }}"
    + "{% endif %}"
    + END
    + GENERATION,
    "numbers turns": TOOLS
    + LOOP
    + "{{ '[' ~ loop.index ~ '] ' }}"
    + TURN % "{{ m.content }}"
    + END
    + "{% if add_generation_prompt %}{{ '[' ~ (messages | length + 1) ~ '] <|im_start|>assistant\n' }}{% endif %}",
    "date": "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %B %Y') + '<|im_end|>\n' }}"
    + TOOLS
    + LOOP
    + TURN % "{{ m.content }}"
    + END
    + GENERATION,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
    },
}


def user(text):
    return {"role": "user", "content": text}


def bot(text, **more):
    return {"role": "assistant", "content": text, **more}


CALL = bot("", tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}])
RESULT = {"role": "tool", "content": "2"}
CONVERSATIONS = {
    "one turn": [user("Hi there"), bot("Hello.")],
    "many turns": [user("Hi"), bot("Yes?"), user("One, please"), bot("Here."), user("Thanks"), bot("Bye.")],
    "system": [{"role": "system", "content": "Be brief."}, user("Hi"), bot("Yes?"), user("Bye"), bot("Bye.")],
    "tools": [user("1 + 1?"), CALL, RESULT, bot("It is 2."), user("Sure?"), bot("Yes.")],
    "reasoning": [
        user("2 + 2?"),
        bot("4", reasoning_content="two twos"),
        user("And 3 + 3?"),
        bot("6", reasoning_content="two threes"),
    ],
}


def byte_tokenizer(template=None):
    """Every byte is a token; EOS ends turns, the tags of thoughts and tool calls are tokens that are not special."""
    vocabulary = {name: i for i, name in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ċ" * 2])}
    backend = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (PAD, "<|im_start|>", EOS)])
    backend.add_tokens(
        [AddedToken(t, normalized=False) for t in ("<think>", "</think>", "<tool_call>", "</tool_call>")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=PAD)
    tokenizer.chat_template = template
    return tokenizer
