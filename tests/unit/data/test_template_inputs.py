"""Variables of chat templates, per row and from settings, which are saved with the tokenizer; tools that are not rendered."""

import pytest
from datasets import Dataset

from rlhf_lightning.commands.sample import select
from rlhf_lightning.data.demonstrations import DemonstrationDataModule
from rlhf_lightning.data.encoding import encode_prompt
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.splits import Split
from rlhf_lightning.data.template_inputs import set_default_variables, tools_of, variables_of
from rlhf_lightning.data.tokenization import (
    demonstrations,
    tokenize_demonstrations,
    tokenize_preferences,
    tokenize_prompts,
)
from rlhf_lightning.data.tokenizers import load_tokenizer
from rlhf_lightning.errors import UserError
from rlhf_lightning.rewards.reward import Samples
from rlhf_lightning.rewards.reward_model import RewardModelReward
from rlhf_lightning.rollouts.prompts import as_prompt_batch
from rlhf_lightning.rollouts.selection import BestOfN
from tests.chat_templates import CALL, RESULT, TEMPLATES, TOOL, bot, byte_tokenizer, user

SWITCH = TEMPLATES["no system"].replace(
    "assistant\n' }}",
    "assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}",
)
SAMPLE = {"text": "a", "score": 1.0, "truncated": False}
OFF, ON = {"enable_thinking": False}, {"enable_thinking": True}


def rows(*values):
    return Dataset.from_list(list(values))


@pytest.fixture
def tokenizer():
    return byte_tokenizer(SWITCH)


def ends(tokenizer, ids):
    return tokenizer.decode(ids).endswith("<think></think>")


def test_a_row_sets_variables_of_its_template(tokenizer):
    given = ['{"enable_thinking": false}', '{"enable_thinking": true}', None, "", "{}"]
    data = rows(*({"prompt": [user("q")], "chat_template_kwargs": own} for own in given))
    made = tokenize_prompts(data, tokenizer)["prompt_ids"][:]
    assert [ends(tokenizer, ids) for ids in made] == [True, False, False, False, False]
    objects = rows(*({"prompt": [user("q")], "chat_template_kwargs": own} for own in (OFF, ON)))
    assert [ends(tokenizer, ids) for ids in tokenize_prompts(objects, tokenizer)["prompt_ids"][:]] == [True, False]


def test_every_kind_of_row_passes_them_on(tokenizer):
    tokenizer.chat_template = "{{ style or 'plain' }}" + TEMPLATES["date"]
    messages, style = [user("q"), bot("a")], {"chat_template_kwargs": {"style": "x"}}
    for mask in ("completion", "assistant", "all"):
        (made,) = tokenize_demonstrations(rows({"messages": messages, **style}), tokenizer, mask=mask)
        assert tokenizer.decode(made["input_ids"]).startswith("x<|im_start|>")
    pair = {"prompt": messages[:1], "chosen": messages[1:], "rejected": [bot("b")], **style}
    (made,) = tokenize_preferences(rows(pair), tokenizer)
    assert tokenizer.decode(made["prompt_ids"]).startswith("x<|im_start|>")


def test_settings_are_saved_with_the_tokenizer_and_rows_come_before(tokenizer, tmp_path):
    set_default_variables(tokenizer, OFF)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert ends(again, encode_prompt(again, [user("q")]))
    assert not ends(again, encode_prompt(again, [user("q")], variables=ON))
    set_default_variables(again, None)
    assert ends(again, encode_prompt(again, [user("q")]))
    set_default_variables(again, {})
    assert not ends(again, encode_prompt(again, [user("q")]))


def test_the_cache_knows_them(tokenizer):
    data = rows({"prompt": [user("q")]})
    plain = tokenize_prompts(data, tokenizer)["prompt_ids"][0]
    set_default_variables(tokenizer, OFF)
    assert ends(tokenizer, tokenize_prompts(data, tokenizer)["prompt_ids"][0])
    assert not ends(tokenizer, plain)


@pytest.mark.parametrize("module", [DemonstrationDataModule, PromptDataModule])
def test_a_data_module_sets_them(tokenizer, tmp_path, module):
    tokenizer.save_pretrained(tmp_path)
    data = rows(*({"messages": [user(text), bot("a")]} for text in "pqrs"))
    made = module(data, str(tmp_path), split=Split(validation=0), chat_template_kwargs=OFF)
    made.prepare_data()
    assert made.tokenizer.init_kwargs["chat_template_kwargs"] == OFF
    wrong = module(data, str(tmp_path), split=Split(validation=0), chat_template_kwargs={"enable_thinkin": False})
    with pytest.raises(
        UserError, match=r"'enable_thinkin', which the chat template does not read; it reads .*enable_thinking"
    ):
        wrong.prepare_data()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chat_template_kwargs": "{"}, "not JSON"),
        ({"chat_template_kwargs": [1]}, "an object of template variables"),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, "sets 'add_generation_prompt'"),
    ],
)
def test_what_is_no_variable_is_refused(row, message):
    with pytest.raises(UserError, match=message):
        variables_of(row)


def test_tools_and_variables_reach_every_rendering_of_a_prompt(tokenizer):
    """The prompts of generation outside the data modules, and what a reward model reads."""
    columns = {"tools": [[TOOL], None], "chat_template_kwargs": [None, OFF]}
    asked = [[user("q")], [user("q")]]
    batch = as_prompt_batch(tokenizer, asked, columns, "cpu")
    texts = tokenizer.batch_decode([ids[mask] for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)])
    assert ['"add"' in text for text in texts] == [True, False]
    assert [text.endswith("<think></think>") for text in texts] == [False, True]
    reward = RewardModelReward("nowhere")
    reward.tokenizer = tokenizer
    read = reward._encode(
        Samples(asked, ["a", "a"], [[], []], [False, False], columns | {"tools": ['[{"name": "add"}]', None]})
    )
    assert ['"add"' in tokenizer.decode(ids) for ids in read] == [True, False]


def test_tools_and_reasoning_that_are_not_rendered_are_counted(caplog):
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    thought = bot("a", reasoning_content="hm")
    data = rows(
        {"messages": [user("q"), bot("a")], "tools": [TOOL]},
        {"messages": [user("q"), CALL, RESULT, bot("a")], "tools": None},
        {"messages": [user("q"), thought], "tools": None},
        {"messages": [user("q"), thought, user("r"), bot("b")], "tools": None},
    )
    tokenize_demonstrations(data, tokenizer)
    assert "2 of 4 are rows with tools or tool calls that the chat template does not render" in caplog.text
    assert "1 of 4 are rows with reasoning of an answer that the chat template does not render" in caplog.text
    caplog.clear()
    tokenize_demonstrations(data, tokenizer)  # from the cache
    assert "2 of 4 are rows with tools" in caplog.text
    caplog.clear()
    tokenize_prompts(rows({"prompt": [user("q")], "tools": [TOOL]}, {"prompt": [user("r")], "tools": None}), tokenizer)
    assert "1 of 2 are rows with tools" in caplog.text
    caplog.clear()
    tokenize_demonstrations(data, byte_tokenizer(TEMPLATES["strips reasoning"]))
    assert "does not render" not in caplog.text


def test_a_remark_of_a_stream_is_the_same(tokenizer):
    tokenization = demonstrations(byte_tokenizer("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"))
    (made,) = tokenization.encode([{"messages": [user("q"), bot("a")], "tools": [TOOL]}], ["row 1"])
    assert tokenization.remark(made, "row 1") == (
        True,
        "rows with tools or tool calls that the chat template does not render",
    )


def test_tools_as_text():
    assert tools_of({"tools": '[{"name": "f"}]'}) == [{"name": "f"}]
    assert tools_of({"tools": ""}) is tools_of({"tools": []}) is tools_of({}) is None


def test_sampled_rows_bring_what_their_prompt_was_rendered_with():
    candidate = {"prompt": [user("q")], "tools": [TOOL], "chat_template_kwargs": OFF, "samples": [SAMPLE]}
    (row,) = select([candidate], BestOfN(), {"seed": 0})
    assert (row["tools"], row["chat_template_kwargs"]) == ([TOOL], OFF)
    assert "tools" not in select([{"prompt": [user("q")], "samples": [SAMPLE]}], BestOfN(), {"seed": 0})[0]
