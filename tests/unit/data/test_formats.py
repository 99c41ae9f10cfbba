"""Each known format against canonical rows written by hand, and the prompt that two texts share."""

import logging

import pytest
from datasets import Dataset, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.data.format_table import FORMATS, detect_format
from rlhf_lightning.data.formats import to_canonical
from rlhf_lightning.data.implicit_prompt import split_conversations, split_texts
from rlhf_lightning.data.sources import FileSource
from rlhf_lightning.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


OK = {"prompt": "q", "completion": "a"}
Q, A, B = [user("q")], [bot("a")], [bot("b")]
HH = "\n\nHuman: q\n\nAssistant: {}"

# format, row, demonstration, preference, prompt; None where the format can't serve that kind
CASES = [
    ("text", {"text": "t"}, {"text": "t"}, None, None),
    ("hh-rlhf-text", {"text": HH.format("a")}, {"messages": Q + A}, None, Q),
    ("messages", {"messages": Q + A}, {"messages": Q + A}, None, Q),
    ("prompt-only", {"prompt": "q"}, None, None, "q"),
    ("prompt-only", {"prompt": Q}, None, None, Q),
    ("prompt-completion", {"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "a"}, None, "q"),
    ("prompt-completion", {"prompt": Q, "completion": A}, {"prompt": Q, "completion": A}, None, Q),
    (
        "preference",
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        "q",
    ),
    (
        "preference",  # UltraFeedback: the answers repeat a prompt that is text
        {"prompt": "q", "chosen": Q + A, "rejected": Q + B},
        {"prompt": Q, "completion": A},
        {"prompt": Q, "chosen": A, "rejected": B},
        Q,
    ),
    (
        "implicit-preference",
        {"chosen": "is it blue", "rejected": "is it black"},
        {"prompt": "is it", "completion": " blue"},
        {"prompt": "is it", "chosen": " blue", "rejected": " black"},
        "is it",
    ),
    (
        "implicit-preference",
        {"chosen": Q + A, "rejected": Q + B},
        {"prompt": Q, "completion": A},
        {"prompt": Q, "chosen": A, "rejected": B},
        Q,
    ),
    (
        "hh-rlhf",
        {"chosen": HH.format("a"), "rejected": HH.format("b")},
        {"prompt": Q, "completion": A},
        {"prompt": Q, "chosen": A, "rejected": B},
        Q,
    ),
    (
        "unpaired-preference",
        {"prompt": "q", "completion": "a", "label": True},
        {"prompt": "q", "completion": "a"},
        None,
        "q",
    ),
    ("labelled-messages", {"messages": Q + A, "label": True}, {"prompt": Q, "completion": A}, None, Q),
    (
        "labelled-sharegpt",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "kto_tag": True},
        {"prompt": Q, "completion": A},
        None,
        Q,
    ),
    (
        "stepwise",
        {"prompt": "q", "completions": ["s", "t"], "labels": [True, True]},
        {"prompt": "q", "completion": "s\nt"},
        None,
        "q",
    ),
    (
        "prm800k",
        {
            "question": {"problem": "q"},
            "label": {
                "steps": [
                    {"completions": [{"text": "a", "rating": 1}], "human_completion": None, "chosen_completion": 0}
                ]
            },
        },
        {"prompt": Q, "completion": A},
        None,
        Q,
    ),
    (
        "stepwise-ratings",
        {"prompt": "q", "completions": ["s", "t"], "ratings": [1, 1]},
        {"prompt": "q", "completion": "s\nt"},
        None,
        "q",
    ),
    (
        "stepwise",
        {"prompt": Q, "completions": [A, B], "labels": [1, 1]},
        {"prompt": Q, "completion": [bot("a\nb")]},
        None,
        Q,
    ),
    (
        "alpaca",
        {"instruction": "i", "input": "", "output": "a", "system": "s", "history": [["x", "y"]]},
        {"prompt": [system("s"), user("x"), bot("y"), user("i")], "completion": A},
        None,
        [system("s"), user("x"), bot("y"), user("i")],
    ),
    (
        "alpaca-preference",
        {"instruction": "i", "input": "j", "output": "z", "chosen": "a", "rejected": "b"},
        {"prompt": [user("i\nj")], "completion": A},
        {"prompt": [user("i\nj")], "chosen": A, "rejected": B},
        [user("i\nj")],
    ),
    (
        "sharegpt",
        {
            "system": "s",
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": "f"},
                {"from": "observation", "value": "o"},
                {"from": "gpt", "value": "a"},
            ],
        },
        {"messages": [system("s"), *Q, bot("f"), {"role": "tool", "content": "o"}, *A]},
        None,
        [system("s"), *Q, bot("f"), {"role": "tool", "content": "o"}],
    ),
    (
        "sharegpt-preference",
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {"prompt": Q, "completion": A},
        {"prompt": Q, "chosen": A, "rejected": B},
        Q,
    ),
    (
        "swift-preference",
        {"messages": Q + A, "rejected_response": "b"},
        {"prompt": Q, "completion": A},
        {"prompt": Q, "chosen": A, "rejected": B},
        Q,
    ),
    (
        "ranking",
        {"prompt": "q", "completions": ["b", "a"], "ranks": [2, 1]},
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        "q",
    ),
    (
        "ordering",
        {"prompt": Q, "completions": ["b", "a"], "ranking": [1, 0]},
        {"prompt": Q, "completion": A},
        {"prompt": Q, "chosen": A, "rejected": B},
        Q,
    ),
    (
        "messages-preference",
        {"messages": [system("s"), *Q], "chosen": A, "rejected": bot("b")},
        {"prompt": [system("s"), *Q], "completion": A},
        {"prompt": [system("s"), *Q], "chosen": A, "rejected": B},
        [system("s"), *Q],
    ),
    (
        "swift-pairs",
        {"messages": Q + A, "rejected_messages": Q + B},
        {"prompt": Q, "completion": A},
        {"prompt": Q, "chosen": A, "rejected": B},
        Q,
    ),
    (
        "openai-preference",
        {
            "input": {"messages": Q, "tools": [], "parallel_tool_calls": True},
            "preferred_output": A,
            "non_preferred_output": B,
        },
        {"prompt": Q, "completion": A},
        {"prompt": Q, "chosen": A, "rejected": B},
        Q,
    ),
    ("alpaca-prompt", {"instruction": "i", "input": "j"}, None, None, [user("i\nj")]),
    (
        "labelled-alpaca",
        {"instruction": "q", "input": "", "output": "a", "kto_tag": True},
        {"prompt": Q, "completion": A},
        None,
        Q,
    ),
    (
        "nemo-ranking",
        {"context": Q, "completions": [{"rank": 1, "completion": B}, {"rank": 0, "completion": A}]},
        {"prompt": Q, "completion": A},
        {"prompt": Q, "chosen": A, "rejected": B},
        Q,
    ),
]


def test_every_format_has_a_case():
    assert {case[0] for case in CASES} == {known.name for known in FORMATS}


@pytest.mark.parametrize(("name", "row", "demonstration", "preference", "prompt"), CASES)
@pytest.mark.parametrize("kind", ["demonstrations", "preferences", "prompts"])
def test_each_format_by_hand(name, row, demonstration, preference, prompt, kind, caplog):
    caplog.set_level(logging.INFO)
    expected = {"demonstrations": demonstration, "preferences": preference, "prompts": prompt and {"prompt": prompt}}[
        kind
    ]
    dataset = Dataset.from_list([{**row, "source": "web"}] * 2)
    if expected is None:
        with pytest.raises(UserError, match="row 1"):
            to_canonical(dataset, kind)
        return
    assert to_canonical(dataset, kind).to_list() == [{**expected, "source": "web"}] * 2
    assert f"format {name}, used for {kind}" in caplog.text
    assert to_canonical(dataset, kind, format=name).to_list() == [{**expected, "source": "web"}] * 2


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky? It is blue.", "The sky? It is black.", ("The sky? It is", " blue.", " black.")),
        ("Say: Hell", "Say: Hello there", ("Say:", " Hell", " Hello there")),
        ("Say: Hello", "Say: Hello there", ("Say:", " Hello", " Hello there")),
        ("Say: Hello", "Say: Hello ", ("Say:", " Hello", " Hello ")),
        ("a  b", "a b", ("a", "  b", " b")),
        ("Q\nA: x y", "Q\nA: x z", ("Q\nA: x", " y", " z")),
    ],
)
def test_an_implicit_prompt_ends_between_words(chosen, rejected, expected):
    assert split_texts(chosen, rejected) == expected
    prompt, right, left = split_texts(rejected, chosen)
    assert (prompt, left, right) == expected


def test_texts_that_share_no_word_have_no_prompt():
    with pytest.raises(UserError, match="share no prompt"):
        split_texts("Hello", "Hello there")


@given(st.text("ab \n", min_size=1), st.text("ab \n", min_size=1), st.text("ab \n", min_size=1))
def test_an_implicit_prompt_and_its_responses_are_the_texts(prompt, chosen, rejected):
    chosen, rejected = "x " + prompt + chosen, "x " + prompt + rejected
    try:
        shared, left, right = split_texts(chosen, rejected)
    except UserError:
        return
    assert (shared + left, shared + right) == (chosen, rejected)
    assert left
    assert right
    assert left[0].isspace()
    assert right[0].isspace()


def test_conversations_part_where_both_assistants_speak():
    longer = [*Q, *A, user("r"), bot("b")]
    assert split_conversations([*Q, *A, user("r"), bot("a")], longer) == ([*Q, *A, user("r")], A, B)
    assert split_conversations([*Q, *A], longer) == (Q, A, longer[1:])  # one is the beginning of the other
    other = [*Q, *A, user("s"), bot("b")]
    assert split_conversations(longer, other) == (Q, longer[1:], other[1:])  # they part at a user's turn
    with pytest.raises(UserError, match="share no prompt"):
        split_conversations([user("x"), *A], [user("y"), *B])


def test_null_margins_and_other_columns_are_kept():
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b", "margin": m, "id": i} for i, m in enumerate([0.5, None])]
    canonical = to_canonical(Dataset.from_list(rows), "preferences")
    assert canonical["margin"][:] == [0.5, None]
    assert canonical["id"][:] == [0, 1]


def test_pairs_that_are_equal_are_left_out_and_counted(caplog):
    rows = [{"prompt": "q", "chosen": "a", "rejected": r, "id": i} for i, r in enumerate("abac")]
    assert to_canonical(Dataset.from_list(rows), "preferences")["id"][:] == [1, 3]
    assert "2 with the same text as chosen and rejected" in caplog.text
    assert len(to_canonical(Dataset.from_list(rows), "prompts")) == 4  # a prompt is a prompt
    with pytest.raises(UserError, match="no row is left"):
        to_canonical(Dataset.from_list(rows[:1]), "preferences")


def test_disliked_completions_demonstrate_nothing(caplog):
    rows = [{"prompt": "q", "completion": c, "label": c == "a"} for c in "aba"]
    assert to_canonical(Dataset.from_list(rows), "demonstrations")["completion"][:] == ["a", "a"]
    assert "1 with a disliked completion" in caplog.text


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        (
            [{"question": "q", "answer": "a"}],
            "demonstrations",
            r"^f: unknown format: found columns question, answer\n.*prompt-completion \(prompt, completion\)",
        ),
        (
            [{"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": ""}],
            "demonstrations",
            r"f, row 2 .*'completion' is empty",
        ),
        (
            [{"prompt": "q", "completion": "a"}, {"prompt": None, "completion": "a"}],
            "demonstrations",
            r"row 2 .*'prompt' is missing or null",
        ),
        (
            [{"prompt": "q", "completion": "a"}, {"text": "t"}],
            "demonstrations",
            r"row 2 \(read as prompt-completion\).*'prompt' is missing",
        ),
        ([{"prompt": "q", "chosen": " ", "rejected": "a"}], "preferences", r"'chosen' is empty"),
        ([{"prompt": "q", "chosen": "a", "rejected": None}], "preferences", r"'rejected' is missing or null"),
        ([{"prompt": "q", "completion": "a", "label": None}], "prompts", r"'label' is None; it must be true or false"),
        ([{"prompt": 3}], "prompts", r"'prompt' holds int 3"),
        (
            [{"prompt": [*Q, {**bot(""), "tool_calls": [{"name": "f"}]}]}],
            "prompts",
            r"ends with an assistant message without text",
        ),
        ([{"messages": [{"role": "wizard", "content": "x"}]}], "demonstrations", r"role 'wizard'; known: system"),
        ([{"messages": [*Q, bot("")]}], "demonstrations", r"empty assistant message"),
        ([{"messages": Q}], "demonstrations", r"ends with a user message"),
        ([{"prompt": Q, "completion": Q}], "demonstrations", r"begins with a user message"),
        ([{"prompt": "other", "chosen": Q + A, "rejected": Q + B}], "preferences", r"do not repeat"),
        ([{"prompt": "q", "completions": ["s"], "labels": [True, False]}], "prompts", r"same length"),
        ([], "prompts", "f has no rows"),
    ],
)
def test_what_is_wrong_is_named(rows, kind, message):
    with pytest.raises(UserError, match=message):
        to_canonical(Dataset.from_list(rows), kind, origin="f")


def test_text_and_messages_in_one_file_are_refused(tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"prompt": "q"}\n{"prompt": [{"role": "user", "content": "q"}]}\n')
    rows = FileSource(str(path)).load("prompts")["train"]
    with pytest.raises(UserError, match=r"row 2 .*'prompt' as messages, where the rows before give 'prompt' as text"):
        to_canonical(rows, "prompts")


def test_a_format_by_name():
    rows = Dataset.from_list([{"prompt": "q", "completion": "a", "text": "t"}])
    assert to_canonical(rows, "demonstrations", format="text").column_names == ["text"]
    assert to_canonical(rows, "demonstrations").column_names == ["prompt", "completion"]  # not the text beside them
    with pytest.raises(UserError, match="unknown format 'nonsense'; known: "):
        to_canonical(rows, "demonstrations", format="nonsense")
    with pytest.raises(UserError, match="format preference needs columns chosen, rejected"):
        to_canonical(rows, "preferences", format="preference")


def test_content_in_text_parts_and_tool_calls():
    call = {"role": "assistant", "content": None, "tool_calls": ["f()"]}
    features = Features(
        {"messages": List({"role": Value("string"), "content": Value("string"), "tool_calls": List(Value("string"))})}
    )
    rows = Dataset.from_list([{"messages": [{**Q[0], "tool_calls": None}, call]}], features=features)
    message = to_canonical(rows, "demonstrations")[0]["messages"][1]
    assert (message["content"], message["tool_calls"]) == ("", ["f()"])
    parts = [{"role": "user", "content": [{"type": "text", "text": "q"}]}]
    assert to_canonical(Dataset.from_list([{"prompt": parts}]), "prompts")[0]["prompt"] == Q


REAL = [
    ("hh-rlhf/harmless-base-test.jsonl.gz", "hh-rlhf", 2308),  # four of 2312 have an empty answer
    ("kto-demo/dpo_en_demo.json", "sharegpt-preference", 300),
    ("rasbt/instruction-data-with-preference.json", "alpaca-preference", 1094),  # six pairs are equal
]


@pytest.mark.parametrize(("path", "name", "rows"), REAL)
def test_real_preferences(shared, path, name, rows):
    raw = FileSource(str(shared / path)).load("preferences")["train"]
    assert detect_format(raw.column_names, raw[0]).name == name
    canonical = to_canonical(raw, "preferences")
    assert len(canonical) == rows
    for row in canonical:
        assert row["prompt"][-1]["role"] == "user"
        assert row["chosen"][0]["role"] == row["rejected"][0]["role"] == "assistant"
        assert row["chosen"] != row["rejected"]


def test_real_dialogues_are_put_together_again(shared):
    raw = FileSource(str(shared / REAL[0][0])).load("preferences")["train"].select(range(50))
    for row, new in zip(raw, to_canonical(raw, "preferences"), strict=True):
        names = {"user": "Human", "assistant": "Assistant"}
        text = "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in new["prompt"] + new["chosen"])
        assert "".join(text.split()) == "".join(row["chosen"].split())


@pytest.mark.parametrize(
    ("path", "rows"), [("kto-demo/kto_en_demo.json", 150), ("instruction/alpaca_en_demo.json", 999)]
)
def test_real_demonstrations(shared, path, rows):
    raw = FileSource(str(shared / path)).load("demonstrations")["train"]
    assert len(to_canonical(raw, "demonstrations")) == rows


def test_real_stories(shared):
    path = shared / "tinystories" / "tinystories_sample_2MiB.txt"
    rows = FileSource(str(path)).load("demonstrations")["train"]
    assert len(to_canonical(rows, "demonstrations")) == 2317  # 2316 separators, and the sample ends within a story
