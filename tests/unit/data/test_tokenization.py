"""Tokenized datasets: columns by hand, what happens to long rows, the cache, and the split by prompt."""

import pytest
from datasets import Dataset

from rlhf_lightning.data import tokenization
from rlhf_lightning.data.formats import to_canonical
from rlhf_lightning.data.sources import FileSource
from rlhf_lightning.data.tokenization import (
    prompt_key,
    split_by_prompt,
    tokenize_demonstrations,
    tokenize_preferences,
    tokenize_prompts,
)
from rlhf_lightning.errors import UserError
from tests.calls import function_calls

USER, BOT = {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}

DIALOGUE_IDS = [1, 4, 6, 7, 5, 8, 2, 4, 6, 7, 5, 8, 2]
PLAIN_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %} Answer: {{ m.content + eos_token }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %} Answer: {% endif %}"
)


def rows(*values):
    return Dataset.from_list(list(values))


@pytest.mark.parametrize(
    ("row", "mask", "ids", "learnt"),
    [
        ({"text": "a b"}, "completion", [1, 6, 7, 2], "0111"),
        ({"prompt": "a b", "completion": "c"}, "completion", [1, 6, 7, 8, 2], "00011"),
        ({"prompt": "a b", "completion": "c"}, "assistant", [1, 6, 7, 8, 2], "00011"),
        ({"prompt": "a b", "completion": "c"}, "all", [1, 6, 7, 8, 2], "01111"),
        ({"prompt": [USER], "completion": [BOT]}, "completion", [1, 4, 6, 7, 5, 8, 2], "0000011"),
        (
            {"prompt": [USER, BOT, USER], "completion": [BOT]},
            "completion",
            DIALOGUE_IDS,
            "0" * 11 + "11",
        ),
        (
            {"prompt": [USER, BOT, USER], "completion": [BOT]},
            "assistant",
            DIALOGUE_IDS,
            "0000011000011",
        ),
        ({"messages": [USER, BOT, USER, BOT]}, "assistant", DIALOGUE_IDS, "0000011000011"),
    ],
)
def test_demonstrations_by_hand(word, row, mask, ids, learnt):
    (tokenized,) = tokenize_demonstrations(rows(row), word, mask=mask)
    expected = [flag == "1" for flag in learnt]
    counts = {"length": len(ids), "supervised": sum(expected), "weight": 1, "weighted": sum(expected)}
    assert tokenized == {"input_ids": ids, "response_mask": expected, **counts}


def test_a_row_weighs_what_its_column_says(word):
    first, second, cut = tokenize_demonstrations(
        rows(
            {"prompt": "a", "completion": "b c", "weight": 0.25, "completion_truncated": False},
            {"prompt": "a", "completion": "b", "weight": None, "completion_truncated": None},
            {"prompt": "a", "completion": "b c", "weight": 3, "completion_truncated": True},
        ),
        word,
    )
    assert (first["weight"], first["weighted"], first["input_ids"]) == (0.25, 0.75, [1, 6, 7, 8, 2])
    assert (second["weight"], second["weighted"]) == (1, 2)
    assert (cut["weighted"], cut["input_ids"]) == (6, [1, 6, 7, 8])  # sampled, and cut off: it never ended


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), True, "2"])
def test_a_weight_is_a_positive_number(word, weight):
    with pytest.raises(UserError, match=r"row 1 of the demonstrations .*'weight'"):
        tokenize_demonstrations(rows({"prompt": "a", "completion": "b", "weight": weight}), word)


def test_preferences_by_hand(word):
    pair = {"prompt": "a", "chosen": "b"}
    pairs = rows({**pair, "rejected": "c d", "margin": 0.5}, {**pair, "rejected": "c", "margin": None})
    first, second = tokenize_preferences(pairs, word)
    ids = {"prompt_ids": [1, 6], "chosen_ids": [7, 2], "rejected_ids": [8, 9, 2]}
    assert first == {**ids, "margin": 0.5, "chosen_probability": 1.0, "weight": 1.0, "length": 5}
    assert (second["margin"], second["length"]) == (0.0, 4)
    assert str(tokenize_preferences(pairs, word).features["margin"].dtype) == "float32"


def test_prompts_keep_every_column(word):
    (tokenized,) = tokenize_prompts(rows({"prompt": [USER], "answer": "x", "n": 3}), word)
    assert tokenized == {"prompt": [USER], "answer": "x", "n": 3, "prompt_ids": [1, 4, 6, 7, 5], "length": 5}


def test_long_demonstrations(word, caplog):
    texts = [("a", "b c d"), ("a", "b"), ("a b c d", "e")]
    data = rows(*({"prompt": prompt, "completion": completion} for prompt, completion in texts))
    cut = tokenize_demonstrations(data, word, max_length=4)
    assert cut["input_ids"][:] == [[1, 6, 7, 8], [1, 6, 7, 2]]  # the third has no token left to learn
    assert cut["supervised"][:] == [2, 2]
    assert "cut 2 of 3 demonstrations after 4 tokens" in caplog.text
    assert "left out 1 of 3 rows: demonstrations without a token to learn" in caplog.text
    assert tokenize_demonstrations(data, word, max_length=4, truncation="drop")["input_ids"][:] == [[1, 6, 7, 2]]
    with pytest.raises(UserError, match=r"row 1: the demonstration has 6 tokens and the limit is 4 \(2 rows"):
        tokenize_demonstrations(data, word, max_length=4, truncation="error")
    with pytest.raises(UserError, match="no row is left of 3"):
        tokenize_demonstrations(data, word, max_length=2)


def test_long_pairs_are_left_out_aloud(word, caplog):
    data = rows({"prompt": "a", "chosen": "b", "rejected": "c d"}, {"prompt": "a", "chosen": "b", "rejected": "c"})
    assert len(tokenize_preferences(data, word, max_length=4)) == 1
    assert "left out 1 of 2 rows: pairs longer than 4 tokens" in caplog.text
    with pytest.raises(UserError, match="no row is left of 2"):
        tokenize_preferences(data, word, max_length=3)


def test_long_prompts_are_refused_or_left_out(word):
    data = rows({"prompt": "a"}, {"prompt": "a b c"})
    with pytest.raises(UserError, match="row 2: the prompt has 4 tokens and the limit is 3"):
        tokenize_prompts(data, word, max_prompt_length=3)
    assert tokenize_prompts(data, word, max_prompt_length=3, long_prompts="drop")["prompt"][:] == ["a"]


def test_a_row_that_cannot_be_encoded_is_named(word):
    word.chat_template = (
        "{% for m in messages %}{{ raise_exception('no') if m.content == 'x' else m.content }}{% endfor %}"
    )
    data = rows({"prompt": [USER]}, {"prompt": [{"role": "user", "content": "x"}]})
    with pytest.raises(UserError, match=r"row 2 of the prompts .*refuses"):
        tokenize_prompts(data, word)
    with pytest.raises(UserError, match=r"row 1 of the preferences .*'margin' is nan"):
        tokenize_preferences(rows({"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("nan")}), word)


def test_tools_reach_the_template(word):
    word.chat_template = "{{ bos_token }}{% for t in tools or [] %} {{ t.name }}{% endfor %} {{ messages[0].content }}"
    data = rows({"prompt": [USER], "tools": '[{"name": "d"}]'}, {"prompt": [USER], "tools": ""})
    assert tokenize_prompts(data, word)["prompt_ids"][:] == [[1, 9, 6, 7], [1, 6, 7]]
    with pytest.raises(UserError, match=r"row 1 .*'tools' is not JSON"):
        tokenize_prompts(rows({"prompt": [USER], "tools": "{"}), word)


@pytest.fixture
def count_encodings(monkeypatch):
    calls = []
    real = tokenization.Encoder.encode_rows
    monkeypatch.setattr(tokenization.Encoder, "encode_rows", lambda self, r: calls.append(len(r)) or real(self, r))
    return calls


def test_a_second_call_reads_the_cache(word, count_encodings):
    data = rows({"prompt": "a", "completion": "b"})
    first = tokenize_demonstrations(data, word)
    again = tokenize_demonstrations(rows({"prompt": "a", "completion": "b"}), word)
    assert again.to_list() == first.to_list()
    assert count_encodings == [1]


def test_whatever_changes_the_result_misses_the_cache(word, count_encodings, tmp_path):
    data = rows({"prompt": "a", "completion": "b"})
    tokenize_demonstrations(data, word)
    tokenize_demonstrations(rows({"prompt": "a", "completion": "c"}), word)
    tokenize_demonstrations(data, word, mask="all")
    tokenize_demonstrations(data, word, max_length=3)
    tokenize_demonstrations(data, word, cache_dir=tmp_path / "other")
    word.chat_template += " "
    tokenize_demonstrations(data, word)
    word.add_tokens(["z"])
    tokenize_demonstrations(data, word)
    assert len(count_encodings) == 7


@pytest.mark.parametrize("damage", ["truncate", "delete", "json"])
def test_a_damaged_cache_is_made_anew(word, count_encodings, tmp_path, caplog, damage):
    data = rows(*({"prompt": "a", "completion": "b"} for _ in range(100)))
    first = tokenize_demonstrations(data, word).to_list()
    (folder,) = (tmp_path / "cache").iterdir()  # and nothing half-written beside it
    arrow = next(folder.glob("*.arrow"))
    if damage == "truncate":
        arrow.write_bytes(arrow.read_bytes()[:200])
    elif damage == "delete":
        arrow.unlink()
    else:
        (folder / "state.json").write_text("{")
    assert tokenize_demonstrations(data, word).to_list() == first
    assert "are damaged" in caplog.text
    assert len(count_encodings) == 2


def test_a_cache_that_cannot_be_written_is_named(word, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"can't be written.*set RLHF_LIGHTNING_CACHE"):
        tokenize_prompts(rows({"prompt": "a"}), word, cache_dir=tmp_path / "file" / "cache")


def test_several_processes_give_the_same_rows(word, monkeypatch):
    data = rows(*({"prompt": "a " * (i % 5 + 1), "completion": "b"} for i in range(40)))
    alone = tokenize_demonstrations(data, word).to_list()
    monkeypatch.setattr("rlhf_lightning.data.cache.ROWS_PER_PROCESS", 20)
    monkeypatch.setattr("rlhf_lightning.data.cache.code_hash", lambda: "anew")
    assert tokenize_demonstrations(data, word).to_list() == alone


def test_a_pair_takes_as_long_among_many_as_among_few(word):
    """800 calls a pair; a comparison with the pairs before it would grow with their number."""

    def calls(count):
        pairs = rows(
            *(
                {"prompt": [USER], "chosen": [BOT], "rejected": [{**BOT, "content": "d " * (i % 9)}]}
                for i in range(count)
            )
        )
        return function_calls(lambda: tokenize_preferences(pairs, word))

    calls(100)  # what is imported and compiled once
    few, more, many = calls(200), calls(400), calls(800)
    assert (more - few) / 200 < 1600
    assert (many - more) / 400 < 1.3 * (more - few) / 200 + 50


def test_split_by_prompt_keeps_prompts_whole_and_rows_in_place():
    data = rows(*({"prompt": f"p{i % 200}", "n": i} for i in range(600)))
    train, held_out = split_by_prompt(data, 0.2, seed=0)
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert sorted([*train["n"], *held_out["n"]]) == list(range(600))
    assert 20 <= len(set(held_out["prompt"])) <= 60  # 40 expected, sd 5.7
    _, fewer = split_by_prompt(data.select(range(100)), 0.2, seed=0)
    assert set(fewer["prompt"]) <= set(held_out["prompt"])  # more rows move none
    assert set(split_by_prompt(data, 0.2, seed=1)[1]["prompt"]) != set(held_out["prompt"])
    assert len(split_by_prompt(data, 0.0, seed=0)[1]) == 0
    with pytest.raises(UserError, match="must be in"):
        split_by_prompt(data, 1.0, seed=0)


def test_prompt_keys():
    assert prompt_key("a").startswith("ac8d8342")  # sha256 of the JSON text "a", quotes included
    assert prompt_key([USER]) == prompt_key([{"content": "a b", "role": "user"}])
    conversations = rows({"messages": [USER, BOT]}, {"messages": [USER, {**BOT, "content": "other"}]})
    assert 0 in [len(part) for part in split_by_prompt(conversations, 0.5, seed=0)]  # one prompt, one side


def test_real_pairs_from_end_to_end(shared, stories):
    raw = FileSource(str(shared / "rasbt" / "instruction-data-with-preference.json")).load("preferences")["train"]
    stories.chat_template = PLAIN_TEMPLATE
    canonical = to_canonical(raw, "preferences")
    tokenized = tokenize_preferences(canonical, stories)
    assert len(tokenized) == len(canonical) == 1094
    for row, text in zip(tokenized, canonical, strict=True):
        assert stories.decode(row["chosen_ids"]).lstrip() == text["chosen"][0]["content"].lstrip() + "</s>"
        assert row["chosen_ids"].count(2) == row["rejected_ids"].count(2) == row["prompt_ids"].count(1) == 1
