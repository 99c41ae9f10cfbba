"""Rows that are almost right: each is read in full or refused by its column, and none crashes the reader."""

import datetime
import logging

import pytest
from datasets import Dataset

from rlhf_lightning.data.files import from_rows
from rlhf_lightning.data.formats import to_canonical
from rlhf_lightning.data.tokenization import prompt_key, tokenize_demonstrations, tokenize_preferences, tokenize_prompts
from rlhf_lightning.errors import UserError

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
STEPS = {"prompt": [Q], "labels": [True]}
ALPACA = {"instruction": "i", "output": "a"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "message content that is not text"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
            "message content that is not text",
        ),
        ({"messages": [Q, A], "system": 3}, "column 'system' holds int 3"),
        ({**ALPACA, "system": [3]}, "column 'system' holds list"),
        ({**ALPACA, "input": 3}, "column 'input' holds int 3"),
        ({**ALPACA, "history": [["x"]]}, r"column 'history' holds \['x'\]"),
        ({**ALPACA, "history": [["x", None]]}, r"column 'history' holds \['x', None\]"),
        ({**ALPACA, "history": "xy"}, "column 'history' holds 'xy'"),
        ({**STEPS, "completions": 3}, "'completions' and 'labels' must be lists"),
        ({**STEPS, "completions": "a"}, "'completions' and 'labels' must be lists"),
        ({**STEPS, "completions": [[A, A]]}, "a step of several messages"),
    ],
)
def test_what_is_almost_right_is_named(row, message):
    with pytest.raises(UserError, match=f"^f, row 1 .*{message}"):
        to_canonical(from_rows([row]), "prompts", origin="f")


@pytest.mark.parametrize("system", [None, "", " "])
def test_a_blank_system_prompt_is_none(system):
    rows = from_rows([{"messages": [Q, A], "system": system}, {"messages": [Q, A], "system": "s"}])
    first, second = to_canonical(rows, "demonstrations")["messages"]
    assert (first, second) == ([Q, A], [{"role": "system", "content": "s"}, Q, A])


def test_both_spellings_of_a_message_in_one_column():
    rows = Dataset.from_list(
        [{"messages": [{**Q, "from": None, "value": None}, {**SHAREGPT[1], "role": None, "content": None}]}]
    )
    assert to_canonical(rows, "demonstrations").to_list() == [{"messages": [Q, A]}]


def test_what_a_file_with_fixed_columns_fills_with_nulls_is_not_there():
    rows = Dataset.from_list([{"messages": [{**Q, "name": None}, {**A, "name": None, "weight": 1}]}])
    assert to_canonical(rows, "demonstrations").to_list() == [{"messages": [Q, A]}]


def test_tool_calls_keep_their_own_arguments_and_get_no_others():
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": "b", "x": "c"}}]
    messages = [[Q, {"role": "assistant", "content": None, "tool_calls": [call]}] for call in calls]
    canonical = to_canonical(from_rows([{"messages": turns} for turns in messages]), "demonstrations")
    assert [turns[1]["tool_calls"] for turns in canonical["messages"]] == [[call] for call in calls]


def test_prompts_with_values_that_json_does_not_know_have_a_key():
    day = datetime.date(2020, 1, 1)
    assert prompt_key([{**Q, "day": day}]) != prompt_key([{**Q, "day": datetime.date(2020, 1, 2)}])


def test_the_first_words_of_a_row_are_quoted_in_one_line(word):
    rows = Dataset.from_list([{"prompt": "a\nb", "chosen": "c", "rejected": "d", "margin": "much"}])
    with pytest.raises(UserError, match=r"row 1 of the preferences \('a\\nb'") as error:
        tokenize_preferences(rows, word)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("margin", [float("inf"), float("-inf"), float("nan"), 1e39])
def test_margins_that_float32_cannot_hold_are_refused(word, margin):
    rows = Dataset.from_list([{"prompt": "a", "chosen": "c", "rejected": "d", "margin": margin}])
    with pytest.raises(UserError, match=r"'margin' is .*; it must be a finite number"):
        tokenize_preferences(rows, word)


@pytest.mark.parametrize("tools", [[None], ["f"], "3", '["f"]', '{"name": "f"}', "[" * 3000, "9" * 5000])
def test_tools_that_are_no_list_of_schemas_are_refused(word, tools):
    with pytest.raises(UserError, match=r"row 1 of the prompts .*column 'tools' (holds|is not JSON)"):
        tokenize_prompts(Dataset.from_list([{"prompt": [Q], "tools": tools}]), word)


def test_a_template_that_trips_over_a_row_names_it(word):
    word.chat_template = "{% for m in messages %}{{ m.content + m.name }}{% endfor %}"
    rows = Dataset.from_list([{"prompt": [{**Q, "name": 3}]}])
    with pytest.raises(UserError, match=r"row 1 of the prompts .*refuses a conversation of user"):
        tokenize_prompts(rows, word)


def test_a_prompt_without_a_token_is_refused(gpt2):
    from tokenizers import normalizers

    gpt2.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    with pytest.raises(UserError, match=r"row 1 of the prompts .*makes no token of the prompt"):
        tokenize_prompts(Dataset.from_list([{"prompt": "x"}]), gpt2)


def test_columns_that_tokens_replace_are_named(word, caplog):
    caplog.set_level(logging.WARNING)
    rows = Dataset.from_list([{"prompt": "a b", "length": 99, "size": 98}])
    assert tokenize_prompts(rows, word)["length"][:] == [3]
    assert "column 'length' of the prompts is replaced" in caplog.text
    assert "size" not in caplog.text


def test_the_first_token_is_given_and_not_learnt(word):
    (made,) = tokenize_demonstrations(Dataset.from_list([{"text": "a b"}]), word)
    assert made["response_mask"] == [False, True, True, True]
    assert made["supervised"] == 3  # what the loss is divided by: the tokens that something predicts
