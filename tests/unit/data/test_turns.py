"""Only what the assistant says is scored, and not what a message says is not to be; prompts are continued and recognised."""

import json
from functools import partial

import pytest
from datasets import Dataset

from rlhf_lightning.data.chunks import NUMBER, Chunks, make_reading
from rlhf_lightning.data.collate import PreferenceCollator, UnpairedCollator
from rlhf_lightning.data.encoding import encode_messages, encode_pair, encode_prompt
from rlhf_lightning.data.formats import to_canonical
from rlhf_lightning.data.rankings import rankings
from rlhf_lightning.data.tokenization import demonstrations, preferences, prompts, tokenize_prompts, unpaired
from rlhf_lightning.errors import UserError
from tests.chat_templates import CALL, EOS, RESULT, TEMPLATES, bot, byte_tokenizer, user

CHATML = TEMPLATES["no system"]
TRAJECTORY = [CALL, RESULT, bot("2")]
CALLED = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>' + EOS
MULTI_TURN = [name for name in TEMPLATES if name != "EOS at the end"]


@pytest.fixture
def tokenizer():
    return byte_tokenizer(CHATML)


def tokenized(make, kind, *rows):
    return make.tokenize(to_canonical(Dataset.from_list(list(rows)), kind))


def scored(tokenizer, row, side):
    """The text of a response that is scored."""
    ids, skips = row[f"{side}_ids"], row.get(f"{side}_skips") or []
    dropped = {i for start, stop in zip(skips[::2], skips[1::2], strict=True) for i in range(start, stop)}
    return tokenizer.decode([token for i, token in enumerate(ids) if i not in dropped])


def learnt(tokenizer, row):
    return tokenizer.decode([t for t, flag in zip(row["input_ids"], row["response_mask"], strict=True) if flag])


def test_a_tool_result_within_a_completion_is_not_learnt(tokenizer):
    row = {"prompt": [user("1 + 1?")], "completion": TRAJECTORY}
    for mask in ("completion", "assistant"):
        (got,) = tokenized(demonstrations(tokenizer, mask), "demonstrations", row)
        assert learnt(tokenizer, got) == f"{CALLED}2{EOS}"
        assert tokenizer.decode(got["input_ids"]).endswith(
            f"{CALLED}\n<|im_start|>tool\n2{EOS}\n<|im_start|>assistant\n2{EOS}"
        )


@pytest.mark.parametrize("template", MULTI_TURN)
def test_only_the_assistant_is_scored_in_pairs_under_every_template(template):
    tokenizer = byte_tokenizer(TEMPLATES[template])
    row = {"prompt": [user("1 + 1?")], "chosen": TRAJECTORY, "rejected": [bot("3")]}
    (pair,) = tokenized(preferences(tokenizer), "preferences", row)
    said = scored(tokenizer, pair, "chosen")
    assert CALLED in said
    assert said.endswith(f"2{EOS}")
    assert "tool\n" not in said
    assert "im_start" not in said
    whole = tokenizer.apply_chat_template([*row["prompt"], *TRAJECTORY], tokenize=False)
    assert tokenizer.decode(pair["prompt_ids"] + pair["chosen_ids"]) == whole.rstrip()


def test_the_collators_mask_what_is_skipped_and_nothing_else(tokenizer):
    rows = [
        {"prompt": [user("1 + 1?")], "chosen": TRAJECTORY, "rejected": [bot("3")]},
        {"prompt": [user("Hi")], "chosen": [bot("Yes?")], "rejected": TRAJECTORY},
    ]
    pairs = tokenized(preferences(tokenizer), "preferences", *rows)
    batch = PreferenceCollator(tokenizer.pad_token_id)((pairs[:], 1.0))
    texts = [tokenizer.decode(ids[mask].tolist()) for ids, mask in zip(*batch[:1], batch.response_mask, strict=True)]
    assert texts == [f"{CALLED}2{EOS}", f"Yes?{EOS}", f"3{EOS}", f"{CALLED}2{EOS}"]
    assert batch.attention_mask[0].sum() == len(
        pairs[0]["prompt_ids"] + pairs[0]["chosen_ids"]
    )  # it is read, not scored
    single = tokenized(unpaired(tokenizer), "unpaired", *rows)
    both = UnpairedCollator(tokenizer.pad_token_id, 1000)((single[:], 1.0))
    texts = [tokenizer.decode(ids[mask].tolist()) for ids, mask in zip(both.input_ids, both.response_mask, strict=True)]
    assert texts[:4] == [f"{CALLED}2{EOS}", f"3{EOS}", f"Yes?{EOS}", f"{CALLED}2{EOS}"]
    assert texts[4:] == [texts[3], *texts[:3]]  # the prompts with each other's answers


def test_rows_without_skips_have_no_column_for_them(tokenizer):
    (pair,) = tokenized(preferences(tokenizer), "preferences", {"prompt": "a", "chosen": "b", "rejected": "c"})
    assert not {"chosen_skips", "rejected_skips", "scored", "turns", "unread_tools"} & set(pair)


FORKED = {
    "chosen": [user("q"), bot("a"), user("well?"), bot("b")],
    "rejected": [user("q"), bot("x"), user("so?"), bot("y")],
}
SAME_TURNS = {**FORKED, "rejected": [user("q"), bot("x"), user("well?"), bot("y")]}
MORE_TURNS = {**FORKED, "rejected": [user("q"), bot("x")]}


@pytest.mark.parametrize("row", [FORKED, MORE_TURNS])
def test_pairs_whose_prompts_differ_are_refused_dropped_or_accepted(tokenizer, row, caplog):
    fine = {"chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]}
    with pytest.raises(UserError, match=r"row 2 .*differ after these part.*data.differing_prompts"):
        tokenized(preferences(tokenizer), "preferences", fine, row)
    assert len(tokenized(preferences(tokenizer, differing_prompts="drop"), "preferences", fine, row)) == 1
    assert "left out 1 of 2 rows: pairs whose user or system turns differ" in caplog.text
    both = tokenized(preferences(tokenizer, differing_prompts="accept"), "preferences", fine, row)
    assert scored(tokenizer, both[1], "chosen") == f"a{EOS}b{EOS}"
    assert "well?" in tokenizer.decode(both[1]["chosen_ids"])


def test_pairs_with_the_same_user_turns_after_the_fork_are_compared(tokenizer):
    (pair,) = tokenized(preferences(tokenizer), "preferences", SAME_TURNS)
    assert [scored(tokenizer, pair, side) for side in ("chosen", "rejected")] == [f"a{EOS}b{EOS}", f"x{EOS}y{EOS}"]


def test_rankings_whose_prompts_differ_are_refused_too(tokenizer):
    row = {
        "prompt": FORKED["chosen"][:1],
        "completions": [FORKED[s][1:] for s in ("chosen", "rejected")],
        "ranks": [0, 1],
    }
    with pytest.raises(UserError, match="differ after these part"):
        tokenized(rankings(tokenizer), "rankings", row)
    assert len(tokenized(rankings(tokenizer, differing_prompts="accept"), "rankings", row)) == 1


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"loss": False}, {"train": False}, {"trainable": False}, {"weight": 0.0}]
)
def test_a_message_that_is_not_to_be_learnt_is_masked(tokenizer, flag):
    messages = [user("q"), bot("a", **flag), user("r"), bot("b", weight=1)]
    plain = [user("q"), bot("a"), user("r"), bot("b")]
    (got,) = tokenized(demonstrations(tokenizer, "assistant"), "demonstrations", {"messages": messages})
    assert learnt(tokenizer, got) == f"b{EOS}"
    assert got["input_ids"] == encode_messages(tokenizer, plain, "assistant").ids  # the template does not see the flag
    (got,) = tokenized(demonstrations(tokenizer, "all"), "demonstrations", {"messages": messages})
    assert learnt(tokenizer, got) == tokenizer.decode(got["input_ids"][1:]).replace(f"a{EOS}\n", "\n", 1)
    asked = [{**user("q"), **flag}, *messages[2:]]
    (got,) = tokenized(demonstrations(tokenizer, "all"), "demonstrations", {"messages": asked[:1] + messages[1:]})
    assert "q" not in learnt(tokenizer, got)


def test_a_row_with_nothing_left_is_dropped_and_counted(tokenizer, caplog):
    masked, fine = bot("a", weight=0), bot("b")
    rows = [{"messages": [user("q"), masked]}, {"messages": [user("q"), fine]}]
    for mask in ("completion", "assistant"):
        (got,) = tokenized(demonstrations(tokenizer, mask), "demonstrations", *rows)
        assert learnt(tokenizer, got) == f"b{EOS}"
    assert caplog.text.count("left out 1 of 2 rows: demonstrations without a token to learn") == 2
    pairs = [{"prompt": [user("q")], "chosen": [bot("c")], "rejected": [answer]} for answer in (masked, fine)]
    assert len(tokenized(preferences(tokenizer), "preferences", *pairs)) == 1
    assert "left out 1 of 2 rows: pairs without a token to score" in caplog.text
    assert len(tokenized(unpaired(tokenizer), "unpaired", *pairs)) == 3


def test_a_masked_turn_is_no_row_of_its_own_under_a_template_that_rewrites():
    tokenizer = byte_tokenizer(TEMPLATES["empty think block"])
    messages = [user("q"), bot("a", weight=0), user("r"), bot("b"), user("s"), bot("c")]
    got = tokenized(demonstrations(tokenizer, "assistant"), "demonstrations", {"messages": messages})
    assert [learnt(tokenizer, row)[-len("b" + EOS) :] for row in got] == [f"b{EOS}", f"c{EOS}"]


@pytest.mark.parametrize("flag", [{"weight": 0.5}, {"train": "no"}, {"loss": 2}])
def test_a_flag_is_true_or_false(flag):
    row = {"messages": [user("q"), bot("a", **flag)]}
    with pytest.raises(UserError, match=rf"row 1 .*'{next(iter(flag))}'.*true or false"):
        to_canonical(Dataset.from_list([row]), "demonstrations", origin="f")


def test_flags_are_no_difference_between_prompts(tokenizer):
    row = {
        "chosen": [user("q"), bot("a", weight=0), user("r"), bot("b", weight=1)],
        "rejected": [user("q"), bot("a"), user("r"), bot("c")],
    }
    (pair,) = tokenized(preferences(tokenizer), "preferences", row)
    assert scored(tokenizer, pair, "chosen") == f"b{EOS}"
    assert to_canonical(Dataset.from_list([row]), "prompts")["prompt"][0] == [user("q"), bot("a"), user("r")]


def test_a_row_a_turn_is_said_once_with_its_count(caplog):
    tokenizer = byte_tokenizer(TEMPLATES["empty think block"])
    rows = [
        {"messages": [user("q"), bot("a"), user("r"), bot("b")], "weight": 0.5},
        {"messages": [user("q"), bot("a")]},
    ]
    got = tokenized(demonstrations(tokenizer, "assistant"), "demonstrations", *rows)
    assert got["weight"][:] == [0.5, 0.5, 1.0]
    assert caplog.text.count("2 of 3 are single assistant turns of longer conversations") == 1
    again = tokenized(demonstrations(tokenizer, "assistant"), "demonstrations", *rows)  # from the cache
    assert again.to_list() == got.to_list()
    assert caplog.text.count("2 of 3 are single assistant turns") == 2
    assert "damaged" not in caplog.text


def test_dialogues_whose_earlier_answers_are_not_learnt_are_counted(tokenizer, caplog):
    rows = [{"messages": [user("q"), bot("a"), user("r"), bot("b")]}, {"messages": [user("q"), bot("a")]}]
    tokenized(demonstrations(tokenizer, "completion"), "demonstrations", *rows)
    assert "1 of 2 are dialogues with earlier answers, which mask 'completion' does not learn" in caplog.text
    caplog.clear()
    tokenized(
        demonstrations(tokenizer, "completion", max_length=25),
        "demonstrations",
        *rows,
        rows[1] | {"messages": [user("p"), bot("a")]},
    )
    assert "data.mask to 'assistant'" in caplog.text  # more than a tenth lost its answer


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_that_ends_with_the_assistant_is_continued(template):
    tokenizer = byte_tokenizer(TEMPLATES[template])
    prompt = [user("Hi"), bot("Sure,")]
    rendered = tokenizer.apply_chat_template(prompt, tokenize=False, continue_final_message=True)
    assert encode_prompt(tokenizer, prompt) == tokenizer(rendered, add_special_tokens=False).input_ids
    ids, response = encode_pair(tokenizer, prompt, [bot(" here.")])
    whole = tokenizer.apply_chat_template([user("Hi"), bot("Sure, here.")], tokenize=False)
    assert ids == encode_prompt(tokenizer, prompt)
    assert tokenizer.decode(ids + response) == whole.rstrip()
    assert tokenizer.decode(response).strip() == (f"here.\n{EOS}" if template == "EOS at the end" else f"here.{EOS}")


def test_a_continued_prompt_in_every_kind_of_row(tokenizer):
    prompt = [user("q"), bot("a"), user("r"), bot("Sure,")]
    (got,) = tokenize_prompts(to_canonical(Dataset.from_list([{"prompt": prompt}]), "prompts"), tokenizer)
    assert tokenizer.decode(got["prompt_ids"]).endswith("assistant\nSure,")
    row = {"prompt": prompt, "completion": " yes."}
    (got,) = tokenized(demonstrations(tokenizer), "demonstrations", row)
    assert learnt(tokenizer, got) == f" yes.{EOS}"
    first, second = tokenized(demonstrations(tokenizer, "assistant"), "demonstrations", row)
    assert (learnt(tokenizer, first), learnt(tokenizer, second)) == (f"a{EOS}", f" yes.{EOS}")
    (pair,) = tokenized(
        preferences(tokenizer), "preferences", {"prompt": prompt, "chosen": " yes.", "rejected": " no."}
    )
    assert [scored(tokenizer, pair, side) for side in ("chosen", "rejected")] == [f" yes.{EOS}", f" no.{EOS}"]
    with pytest.raises(UserError, match="ends with an assistant message without text"):
        tokenized(prompts(tokenizer), "prompts", {"prompt": [user("q"), CALL]})


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_conversation_that_starts_with_the_assistant_is_learnt_turn_by_turn(template):
    tokenizer = byte_tokenizer(TEMPLATES[template])
    messages = [bot("Hello!"), user("q"), bot("a")]
    got = tokenized(demonstrations(tokenizer, "assistant"), "demonstrations", {"messages": messages})
    said = "".join(learnt(tokenizer, row) for row in got)
    assert "Hello!" in said
    assert said.endswith(EOS)
    assert "im_start" not in said
    assert "q" not in said
    (last,) = tokenized(demonstrations(tokenizer, "completion"), "demonstrations", {"messages": messages})
    assert "Hello!" not in learnt(tokenizer, last)
    with pytest.raises(UserError, match="answer and no prompt"):
        tokenized(demonstrations(tokenizer, "assistant"), "demonstrations", {"messages": messages[:1]})


@pytest.mark.parametrize(
    ("row", "kind", "make"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "preferences", preferences),
        ({"prompt": [user("q")], "chosen": [bot("a")], "rejected": [bot("")]}, "preferences", preferences),
        ({"chosen": [user("q"), bot("a")], "rejected": [user("q"), bot(" ")]}, "preferences", preferences),
        ({"prompt": "q", "completion": " ", "label": False}, "unpaired", unpaired),
        ({"prompt": [user("q")], "completion": [bot("")], "label": False}, "unpaired", unpaired),
        ({"messages": [user("q"), bot("")], "label": False}, "unpaired", unpaired),
        ({"messages": [user("q"), bot("a")], "rejected_response": ""}, "preferences", preferences),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant:"},
            "preferences",
            preferences,
        ),
    ],
)
def test_an_empty_worse_answer_is_eos_alone(tokenizer, row, kind, make):
    (got,) = tokenized(make(tokenizer), kind, row)
    side = got["rejected_ids"] if kind == "preferences" else got["completion_ids"]
    assert tokenizer.decode(side).strip() == EOS


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "", "rejected": "a"},
        {"prompt": [user("q")], "chosen": [bot("")], "rejected": [bot("a")]},
        {"prompt": [user("q"), bot(""), user("r")], "chosen": [bot("a")], "rejected": [bot("")]},
    ],
)
def test_an_empty_better_answer_or_earlier_turn_is_refused(row):
    with pytest.raises(UserError, match="empty"):
        to_canonical(Dataset.from_list([row]), "preferences")


@pytest.mark.parametrize(
    "answer", [CALL, bot("", reasoning_content="hm"), bot(None, reasoning="hm"), bot("", thinking="hm")]
)
def test_an_answer_may_call_a_tool_or_think_without_content(answer):
    (row,) = to_canonical(Dataset.from_list([{"messages": [user("q"), answer]}]), "demonstrations")
    assert row["messages"][1]["content"] == ""


@pytest.mark.parametrize("sides", [("chosen",), ("chosen", "rejected")])
def test_a_prompt_repeated_before_the_answers_is_recognised(sides):
    prompt = [{"role": "system", "content": "s"}, user("q")]
    row = {"prompt": prompt, "chosen": [bot("a")], "rejected": [bot("b")]}
    repeated = row | {side: [*prompt, *row[side]] for side in sides}
    assert to_canonical(Dataset.from_list([repeated]), "preferences").to_list() == [row]
    whole = {"prompt": prompt, "completion": [*prompt, bot("a")]}
    assert to_canonical(Dataset.from_list([whole]), "demonstrations").to_list() == [whole | {"completion": [bot("a")]}]
    with pytest.raises(UserError, match="must hold the answer alone, or the complete prompt before it"):
        to_canonical(Dataset.from_list([row | {"chosen": [user("other"), bot("a")]}]), "preferences")


def test_answers_of_several_messages_stay_together(tokenizer):
    messages = [user("q"), bot("Let me see."), bot("It is a.")]
    for mask in ("completion", "assistant"):
        (got,) = tokenized(demonstrations(tokenizer, mask), "demonstrations", {"messages": messages})
        assert learnt(tokenizer, got) == f"Let me see.{EOS}It is a.{EOS}"
    pair = {"chosen": messages, "rejected": [*messages[:2], bot("It is b.")]}
    (got,) = tokenized(preferences(tokenizer), "preferences", pair)
    assert tokenizer.decode(got["prompt_ids"] + got["rejected_ids"]).count("im_start") == 3


TAIL = "{% for m in messages %}{{ m.role + ': ' + m.content + '|' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{{ messages | length ~ ' turns ' }}" + TAIL + "{% if add_generation_prompt %}assistant: {% endif %}",
            "differently",
        ),
        ("{% for m in messages %}{{ loop.index ~ '/' ~ loop.length ~ m.content }}{% endfor %}", "differently"),
    ],
)
def test_a_template_that_counts_all_turns_is_refused(template, reason):
    tokenizer = byte_tokenizer(template)
    messages = [user("q"), bot("a")]
    for make, kind, row in (
        (demonstrations(tokenizer), "demonstrations", {"messages": messages}),
        (demonstrations(tokenizer, "assistant"), "demonstrations", {"messages": messages}),
        (preferences(tokenizer), "preferences", {"prompt": messages[:1], "chosen": "a", "rejected": "b"}),
    ):
        with pytest.raises(UserError, match=reason):
            tokenized(make, kind, row)


def test_a_generation_prompt_that_no_answer_has_is_said_once(caplog):
    """And its first characters are not taken for those of an answer that begins alike."""
    tokenizer = byte_tokenizer(TEMPLATES["opens think"].replace("<think>\n' }}{% endif", "<think>\nHm, ' }}{% endif"))
    for answer in ("<thorough answer", "Plain."):
        prompt, response = encode_pair(tokenizer, [user("q")], [bot(answer)])
        assert tokenizer.decode(response) == answer + EOS
        assert tokenizer.decode(prompt).endswith("assistant\n")
    assert caplog.text.count("begins a generation with '<think>") == 1


def test_a_template_without_a_generation_prompt(caplog):
    """The text may end with an EOS that nothing follows, which is no part of the prompt."""
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{{ eos_token }}"
    )
    prompt, response = encode_pair(tokenizer, [user("q")], [bot("a")])
    assert tokenizer.decode(prompt) == "user: q\n"
    assert tokenizer.decode(response) == f"assistant: a\n{EOS}"
    assert encode_prompt(tokenizer, [user("q")]) == prompt


def test_markers_in_a_template_that_rewrites_are_not_believed():
    marked = TEMPLATES["strips reasoning"].replace(
        "{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"
    )
    tokenizer = byte_tokenizer(marked)
    messages = [user("q"), bot("a", reasoning_content="hm"), user("r"), bot("b", reasoning_content="ha")]
    got = tokenized(demonstrations(tokenizer, "assistant"), "demonstrations", {"messages": messages})
    assert ["hm" in learnt(tokenizer, got[0]), "ha" in learnt(tokenizer, got[1])] == [True, True]
    assert "hm" not in tokenizer.decode(got[1]["input_ids"])


def test_a_truncated_answer_has_no_end_under_every_mask(tokenizer):
    row = {"prompt": [user("q")], "completion": [bot("a")], "completion_truncated": True}
    for mask in ("completion", "assistant", "all"):
        (got,) = tokenized(demonstrations(tokenizer, mask), "demonstrations", row)
        assert tokenizer.decode(got["input_ids"]).endswith("assistant\na")


def test_a_stream_makes_a_row_a_turn_too(tmp_path):
    tokenizer = byte_tokenizer(TEMPLATES["empty think block"])
    talks = [[user("q"), bot("a"), user("r"), bot("b")], [user("q"), bot("a")]]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    reading = make_reading([file], "demonstrations", None, partial(demonstrations, tokenizer, "assistant"), None)
    (chunk,) = Chunks(reading, 0)
    whole = tokenized(demonstrations(tokenizer, "assistant"), "demonstrations", *({"messages": talk} for talk in talks))
    assert [row["input_ids"].tolist() for row in chunk.rows] == whole["input_ids"][:]
    assert [row[NUMBER] for row in chunk.rows] == [0, 0, 1]
    assert sum(count for remark, count in chunk.remarks.items() if "single assistant turns" in remark) == 2
