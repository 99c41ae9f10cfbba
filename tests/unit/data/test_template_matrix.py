"""Every kind of conversation in every use under eight chat templates: what transformers renders, or a refusal that is true.

``python -m pytest tests/unit/data/test_template_matrix.py -s`` prints the table.
"""

import pytest

from rlhf_lightning.data.encoding import encode_pair, encode_prompt
from rlhf_lightning.data.formats import Converter, detect_format
from rlhf_lightning.data.tokenization import demonstrations, preferences, prompts, unpaired
from rlhf_lightning.errors import UserError
from tests.chat_templates import CONVERSATIONS, EOS, TEMPLATES, TOOL, bot, byte_tokenizer

USES = ("SFT completion", "SFT assistant", "DPO", "reward", "KTO", "prompts", "chat")
WORSE = bot("No idea.")
# Templates under which a turn is not written as it is once another follows, so that each is a training row of its own.
REWRITE = {
    "strips reasoning": {"reasoning"},
    "empty think block": {"many turns", "system", "tools", "reasoning"},
    "opens think": set(CONVERSATIONS),
    "EOS at the end": {"many turns", "system", "tools", "reasoning"},
}
TABLE: dict[tuple[str, str, str], str] = {}


@pytest.fixture(scope="module", autouse=True)
def table():
    TABLE.clear()
    yield
    print()
    for template in TEMPLATES:
        for said in CONVERSATIONS:
            cells = [f"{use}: {TABLE.get((template, said, use), '-')}" for use in USES]
            print(f"{template:18} {said:11} {'; '.join(cells)}")


class Reference:
    """What transformers renders of a conversation, and where its answers begin."""

    def __init__(self, template, said):
        self.tokenizer, self.messages = byte_tokenizer(TEMPLATES[template]), CONVERSATIONS[said]
        self.tools = [TOOL] if said == "tools" else None

    def text(self, messages, **settings):
        return self.tokenizer.apply_chat_template(messages, tools=self.tools, tokenize=False, **settings)

    def prompt(self, messages):
        return self.text(messages, add_generation_prompt=True)

    def prompt_ids(self, messages):
        return self.tokenizer(self.prompt(messages), add_special_tokens=False).input_ids

    def pair(self, messages, answer):
        """Prompt and response: the rendering is cut behind the generation prompt, or behind what it has of that."""
        prompt, text = self.prompt(messages), self.text([*messages, answer])
        if not text.startswith(prompt):
            prompt = prompt.removesuffix("<think>\n")
        assert text.startswith(prompt)
        return prompt, ended(text[len(prompt) :])

    def turns(self):
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]


def ended(text):
    """With one EOS, and nothing after it."""
    return text.rstrip() if text.rstrip().endswith(EOS) else text + EOS


def made(make, kind, row):
    """The tokenized rows of one row, and the text of their ids."""
    converter = Converter(detect_format(list(row), row), kind, "f")
    others = {name: row[name] for name in converter.divide(list(row))[1]}
    rows = [{**new, **others} for new in converter.try_row(row, "row 1")]
    return make.encode(rows, [f"row {i}" for i in range(len(rows))])


def learnt(tokenizer, row):
    return tokenizer.decode([t for t, flag in zip(row["input_ids"], row["response_mask"], strict=True) if flag])


def check_completion(reference):
    row = {"messages": reference.messages, "tools": reference.tools}
    (got,) = made(demonstrations(reference.tokenizer, "completion"), "demonstrations", row)
    prompt, response = reference.pair(reference.messages[:-1], reference.messages[-1])
    assert reference.tokenizer.decode(got["input_ids"]) == prompt + response
    assert learnt(reference.tokenizer, got) == response
    return "equal"


def check_assistant(reference, rewritten):
    tokenizer, row = reference.tokenizer, {"messages": reference.messages, "tools": reference.tools}
    got = made(demonstrations(tokenizer, "assistant"), "demonstrations", row)
    expected = [reference.pair(reference.messages[:turn], reference.messages[turn]) for turn in reference.turns()]
    if not rewritten:
        assert len(got) == 1
        assert tokenizer.decode(got[0]["input_ids"]) == ended(reference.text(reference.messages))
        assert learnt(tokenizer, got[0]) == "".join(response for _, response in expected)
        return "equal"
    assert [tokenizer.decode(row["input_ids"]) for row in got] == ["".join(pair) for pair in expected]
    assert [learnt(tokenizer, row) for row in got] == [response for _, response in expected]
    return "equal, a row a turn" if len(got) > 1 else "equal"


def pair_row(reference):
    *prompt, answer = reference.messages
    return {"prompt": prompt, "chosen": [answer], "rejected": [WORSE], "tools": reference.tools}


def expected_pair(reference):
    """The prompt that both sides have, and the responses."""
    row = pair_row(reference)
    pairs = [reference.pair(row["prompt"], row[side][0]) for side in ("chosen", "rejected")]
    prompt = min((prompt for prompt, _ in pairs), key=len)
    return prompt, [(own + response)[len(prompt) :] for own, response in pairs]


def check_pairs(reference):
    (got,) = made(preferences(reference.tokenizer), "preferences", pair_row(reference))
    decode = reference.tokenizer.decode
    sides = [decode(got["chosen_ids"]), decode(got["rejected_ids"])]
    assert (decode(got["prompt_ids"]), sides) == expected_pair(reference)
    assert got["chosen_skips"] == got["rejected_skips"] == []
    prompt = reference.prompt_ids(reference.messages[:-1])
    assert got["prompt_ids"] == prompt[: len(got["prompt_ids"])]
    shorter = decode(prompt[len(got["prompt_ids"]) :])
    return "equal" if not shorter else f"equal, without the {shorter.strip()} that answers lack"


def check_reward(reference):
    """What a reward model reads of a sampled answer is what it read of that answer in training."""
    result, (got,) = check_pairs(reference), made(preferences(reference.tokenizer), "preferences", pair_row(reference))
    prompt, response = encode_pair(reference.tokenizer, reference.messages[:-1], [WORSE], reference.tools)
    assert prompt + response == got["prompt_ids"] + got["rejected_ids"]
    return result


def check_unpaired(reference):
    got = made(unpaired(reference.tokenizer), "unpaired", pair_row(reference))
    assert [row["label"] for row in got] == [True, False]
    decode, row = reference.tokenizer.decode, pair_row(reference)
    for one, side in zip(got, ("chosen", "rejected"), strict=True):
        assert (decode(one["prompt_ids"]), decode(one["completion_ids"])) == reference.pair(row["prompt"], row[side][0])
    return "equal"


def check_prompts(reference):
    row = {"messages": reference.messages, "tools": reference.tools}
    (got,) = made(prompts(reference.tokenizer), "prompts", row)
    assert got["prompt_ids"] == reference.prompt_ids(reference.messages[:-1])
    return "equal"


def check_chat(reference):
    """As `chat` asks: at each of the assistant's turns, with the turns so far."""
    for turn in reference.turns():
        asked = reference.messages[:turn]
        assert encode_prompt(reference.tokenizer, asked, reference.tools) == reference.prompt_ids(asked)
    return "equal"


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("said", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_cell_equals_what_transformers_renders_or_is_refused_for_a_true_reason(template, said, use):
    reference = Reference(template, said)
    checks = {
        "SFT completion": check_completion,
        "SFT assistant": lambda own: check_assistant(own, said in REWRITE.get(template, ())),
        "DPO": check_pairs,
        "reward": check_reward,
        "KTO": check_unpaired,
        "prompts": check_prompts,
        "chat": check_chat,
    }
    if (template, said) == ("no system", "system"):  # the template says so itself
        with pytest.raises(UserError, match="System role not supported"):
            checks[use](reference)
        TABLE[template, said, use] = "refused: System role not supported"
        return
    TABLE[template, said, use] = checks[use](reference)
