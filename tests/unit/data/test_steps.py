"""Solutions step by step: rows read, tokens joined, labels where they belong, and what is refused."""

import json
import logging

import pytest
import torch
from datasets import Dataset, DatasetDict

from rlhf_lightning.data.corrupted_steps import CorruptedSteps, changed
from rlhf_lightning.data.formats import to_canonical
from rlhf_lightning.data.sources import FileSource, Source
from rlhf_lightning.data.splits import Split
from rlhf_lightning.data.steps import StepEncoder, solutions, split_steps
from rlhf_lightning.data.stepwise import StepwiseDataModule
from rlhf_lightning.errors import UserError


def canonical(*rows):
    return to_canonical(Dataset.from_list(list(rows)), "stepwise", origin="rows.jsonl")


def row(**columns):
    return {"prompt": "q", "completions": ["s", "t", "u"], **columns}


def user(text):
    return [{"role": "user", "content": text}]


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        ({"labels": [True, True, False]}, [1, 1, 0]),
        ({"labels": [1, 0, 1]}, [1, 0, 1]),
        ({"labels": [0.75, 0.5, 0.0]}, [0.75, 0.5, 0]),
        ({"labels": [1, None, 0]}, [1, None, 0]),
        ({"ratings": [1, 0, 1]}, [1, 1, 1]),  # PRM800K: neutral counts as right
        ({"ratings": [0, -1, 1]}, [1, 0, None]),  # and of what follows the first error nothing is known
        ({"ratings": [-1, -1, None]}, [0, None, None]),
    ],
)
def test_labels_and_ratings_as_probabilities(given, labels):
    (made,) = canonical(row(**given))
    assert made == {"prompt": "q", "completions": ["s", "t", "u"], "labels": labels}


def test_steps_given_as_messages_become_text():
    steps = [[{"role": "assistant", "content": text}] for text in "st"]
    (made,) = canonical({"prompt": user("q"), "completions": steps, "labels": [True, False]})
    assert made == {"prompt": user("q"), "completions": ["s", "t"], "labels": [1, 0]}


def prm800k(*steps, **more):
    """A row as released; of each step the texts with their ratings, which was chosen, and what a person wrote instead."""
    listed = [
        {
            "completions": [{"text": text, "rating": rating, "flagged": None} for text, rating in offered],
            "human_completion": human,
            "chosen_completion": chosen,
        }
        for offered, chosen, human in steps
    ]
    return {"labeler": "x", "question": {"problem": "q"}, "label": {"steps": listed, "total_time": 1}, **more}


def test_prm800k_as_released():
    first = ([("a", 0), ("b", -1)], 0, None)
    written = ([("c", -1)], None, {"text": "d", "rating": None})
    ended = ([("e", 0), ("f", -1), ("g", -1)], None, None)
    rows = canonical(
        prm800k(first, written, ([("h", 1)], 0, None)), prm800k(first, ended), prm800k(first, ([("e", 0)], None, None))
    )
    assert [row["completions"] for row in rows] == [["a", "d", "h"], ["a", "f"], ["a"]]
    assert [row["labels"] for row in rows] == [[1, 1, 1], [1, 0], [1]]
    assert rows[0]["prompt"] == user("q")
    with pytest.raises(UserError, match=r"row 2 .*not as in PRM800K"):
        canonical(prm800k(first), prm800k(first, label={"total_time": 1}))


def test_rows_without_a_label_are_left_out_and_counted(caplog):
    caplog.set_level(logging.WARNING)
    assert len(canonical(row(labels=[None] * 3), row(labels=[1, 1, 1.0]))) == 1
    assert "1 with no label on any step" in caplog.text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (row(labels=[True, False]), ("row 2", "completions", "labels", "same length")),
        (row(labels=[]), ("row 2", "not empty")),
        (row(labels=[1, 1, 1.5]), ("row 2", "labels", "1.5", "0 to 1")),
        (row(labels=[1, 1, -1]), ("row 2", "ratings")),
        (row(labels=[1, 1, "+"]), ("row 2", "labels", "'+'")),
        (row(ratings=[1, 1, 0.5], labels=None), ("row 2",)),
        ({"prompt": "q", "completions": ["s", ""], "labels": [1, 1]}, ("row 2", "completions", "empty")),
    ],
)
def test_labels_that_do_not_fit_their_steps_are_named(tmp_path, given, words):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row(labels=[1, 1, 1])) + "\n" + json.dumps(given) + "\n")
    with pytest.raises(UserError) as caught:
        to_canonical(FileSource(str(path)).load("stepwise")["train"], "stepwise", "stepwise", origin=str(path))
    for word in (str(path), *words):
        assert word in str(caught.value)


def test_a_rating_is_one_of_three():
    with pytest.raises(UserError, match=r"rows.jsonl, row 1 .*'ratings' holds 0.5"):
        canonical(row(ratings=[1, 1, 0.5]))


def test_other_rows_have_no_steps():
    with pytest.raises(UserError, match="'completions'"):
        canonical({"prompt": "q", "completion": "a"})


# ---------------------------------------------------------------- tokens


def encoded(tokenizer, separator, **columns):
    made = solutions(tokenizer, separator)
    return made.encode(
        [{"prompt": "a b", "completions": ["c d", "e", "f f f"], "labels": [1.0, None, 0.0], **columns}], ["row"]
    )[0]


def test_labels_stand_at_the_separator_behind_their_step(word):
    """<pad> 0 ... then a to f from 6 on; the separator is <assistant>, id 5; BOS 1 stands in front."""
    made = encoded(word, "<assistant>")
    assert made["input_ids"] == [1, 6, 7, 8, 9, 5, 10, 5, 11, 11, 11, 5]
    assert made["prompt_length"] == 3
    assert made["label_at"] == [5, 11]
    assert made["labels"] == [1, 0]
    assert (made["length"], made["labelled"]) == (12, 2)


def test_the_last_labelled_step_alone(word):
    made = solutions(word, "<assistant>", last_step_only=True)
    rows = [{"prompt": "a", "completions": ["b", "c", "d"], "labels": [1.0, 0.0, None]}]
    assert [made.encode(rows, ["row"])[0][name] for name in ("label_at", "labels", "labelled")] == [[5], [0], 1]


@pytest.mark.parametrize("separator", ["\n", "\n\n", " ки\n", "hi"])
def test_nothing_merges_across_the_end_of_a_step(gpt2, separator):
    """The tokenizer would make one token of two blanks, and of "hi"; its ids are joined to what the text says all the same."""
    steps = ["one ", " two", "h"]
    whole = StepEncoder(gpt2, separator).encode(["What?"], [steps])[0]
    assert gpt2.decode(whole.ids) == "What?" + "".join(step + separator for step in steps)
    ids = gpt2(separator, add_special_tokens=False).input_ids
    for end in whole.ends:
        assert whole.ids[end - len(ids) + 1 : end + 1] == ids
    assert len(whole.ends) == 3


def test_a_beginning_of_a_solution_is_a_beginning_of_its_tokens(gpt2):
    encoder, steps = StepEncoder(gpt2, "\n"), ["one hi", "hi two", "h"]
    whole, part = encoder.encode(["What?"] * 2, [steps, steps[:2]])
    assert whole.ids[: len(part.ids)] == part.ids
    assert whole.ends[:2] == part.ends


def test_steps_follow_the_prompt_of_a_template(chatml):
    whole = StepEncoder(chatml, "\n").encode([user("q")], [["s <|im_end|>", "t"]])[0]
    assert chatml.decode(whole.ids[: whole.prompt_length]).endswith("<|im_start|>assistant\n")
    assert chatml.decode(whole.ids[whole.prompt_length :]) == "s <|im_end|>\nt\n"
    assert whole.ids.count(chatml.eos_token_id) == 1  # of the user's turn: what a step says ends nothing


def test_real_sentencepiece_text_comes_back(stories):
    steps = ["Lily had 3 apples.", "She ate one, so 2 were left."]
    whole = StepEncoder(stories, "\n").encode(["Once upon a time:"], [steps])[0]
    assert stories.decode(whole.ids, skip_special_tokens=True).strip() == "Once upon a time:" + "\n".join(steps)
    assert [stories.decode(whole.ids[end : end + 1]) for end in whole.ends] == ["\n", "\n"]


@pytest.mark.parametrize(
    ("separator", "words"), [("", "empty"), ("\n", "no token"), ("step", "no token"), ("a  b", "merges")]
)
def test_a_separator_that_the_tokenizer_does_not_keep_is_refused(word, separator, words):
    """A tokenizer of whole words, split at white space."""
    with pytest.raises(UserError, match=words):
        StepEncoder(word, separator)


@pytest.mark.parametrize("step", ["one\n\ntwo", "\n\n", "one\n"])
def test_a_separator_inside_a_step_is_refused(gpt2, step):
    made = solutions(gpt2, "\n\n")
    with pytest.raises(UserError, match=r"row 7 .*step 2 holds the separator"):
        made.encode([{"prompt": "q", "completions": ["s", step], "labels": [1.0, 1.0]}], ["row 7"])


def test_nothing_is_cut_long_solutions_are_left_out_and_counted_or_refused(word, caplog):
    rows = Dataset.from_list([{"prompt": "a", "completions": ["b"] * n, "labels": [1.0] * n} for n in (2, 9)])
    caplog.set_level(logging.WARNING)
    kept = solutions(word, "<assistant>", max_length=8).tokenize(rows)
    assert kept["labelled"][:] == [2]
    assert "left out 1 of 2 rows: solutions longer than 8 tokens" in caplog.text
    with pytest.raises(UserError, match=r"row 2: the solution has 20 tokens and the limit is 8"):
        solutions(word, "<assistant>", max_length=8, long_rows="error").tokenize(rows)


@pytest.mark.parametrize(
    ("text", "steps"), [("a\nb", ["a", "b"]), ("a\n\n b\n", ["a", " b"]), ("", [""]), ("\n \n", [""]), ("a", ["a"])]
)
def test_responses_are_split_and_one_that_says_nothing_is_one_step(text, steps):
    assert split_steps(text, "\n") == steps


# ---------------------------------------------------------------- batches


class Rows(Source):
    def __init__(self, rows, tokenizer):
        self.rows, self.made = rows, tokenizer

    def load(self, kind):
        return DatasetDict(train=Dataset.from_list(self.rows))

    def tokenizer(self):
        return self.made


def test_a_batch_and_what_its_loss_is_divided_by(word):
    rows = [
        {"prompt": "a", "completions": ["b c", "d"], "labels": [1.0, 0.25]},
        {"prompt": "a b c", "completions": ["e"], "labels": [0.0]},
    ]
    data = StepwiseDataModule(Rows(rows, word), batch_size=2, separator="<assistant>", split=Split(validation=0))
    data.prepare_data()
    (batch,) = data.train_dataloader()
    order = batch.attention_mask.sum(1).argsort(descending=True)
    ids, steps, labels = (x[order] for x in (batch.input_ids, batch.step_mask, batch.labels))
    assert ids.tolist() == [
        [1, 6, 7, 8, 5, 9, 5],
        [1, 6, 7, 8, 10, 5, 0],
    ]
    assert steps.int().tolist() == [[0, 0, 0, 0, 1, 0, 1], [0, 0, 0, 0, 0, 1, 0]]
    assert labels.tolist() == [[0, 0, 0, 0, 1, 0, 0.25], [0] * 7]
    assert batch.response_mask[order].int().tolist() == [[0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 0]]
    assert batch.normalizer.item() == 3
    assert (batch.labels.dtype, batch.step_mask.dtype) == (torch.float32, torch.bool)


# ---------------------------------------------------------------- corrupted solutions

GSM = {"question": "How many?", "answer": "He has 2*3=<<2*3=6>>6 eggs.\nThen 6+4=<<6+4=10>>10.\n#### 10"}


def test_some_solutions_end_with_a_wrong_number(tmp_path):
    path = tmp_path / "gsm.jsonl"
    rows = [{**GSM, "question": f"How many, {n}?"} for n in range(400)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = CorruptedSteps(str(path)).load("stepwise")["train"]
    right = GSM["answer"].split("\n")
    wrong = [row for row in made if 0.0 in row["labels"]]
    assert 150 < len(wrong) < 250
    for row in made:
        assert row["completions"][: len(row["labels"]) - 1] == right[: len(row["labels"]) - 1]
        assert (row["completions"][-1] == right[len(row["labels"]) - 1]) == (row["labels"][-1] == 1)
        assert row["labels"][:-1] == [1.0] * (len(row["labels"]) - 1)
    assert {len(row["labels"]) for row in wrong} == {1, 2, 3}
    assert all(row["completions"][0].startswith("He has 2*3=<<2*3=6>>") for row in made)  # the annotation is untouched
    assert CorruptedSteps(str(path)).load("stepwise")["train"][:] == made[:]
    plain = CorruptedSteps(str(path), corrupted=0, keep_calculator=False).load("stepwise")["train"]
    assert plain[0]["completions"] == ["He has 2*3=6 eggs.", "Then 6+4=10.", "#### 10"]


def test_some_solutions_end_with_a_step_of_another(tmp_path):
    path = tmp_path / "gsm.jsonl"
    rows = [{"question": f"How many, {n}?", "answer": f"He has {n}.\nAnd {n}.\n#### {n}"} for n in range(400)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = CorruptedSteps(str(path), wrong="step").load("stepwise")["train"]
    wrong = [row for row in made if 0.0 in row["labels"]]
    assert 150 < len(wrong) < 250
    assert {len(row["labels"]) for row in wrong} == {1, 2, 3}
    for number, row in enumerate(made):
        assert [step in rows[number]["answer"].split("\n") for step in row["completions"]] == [
            label == 1 for label in row["labels"]
        ]


def test_a_foreign_step_needs_a_second_row(tmp_path):
    path = tmp_path / "gsm.jsonl"
    path.write_text(json.dumps(GSM) + "\n")
    with pytest.raises(UserError, match="has one row: a foreign step needs another; give wrong: number"):
        CorruptedSteps(str(path), wrong="step").load("stepwise")
    with pytest.raises(UserError, match="wrong is one of number, step, not 'digit'"):
        CorruptedSteps(str(path), wrong="digit")


@pytest.mark.parametrize("step", ["makes 1,200.50 dollars", "5", "10"])
def test_one_digit_changes_and_no_number_gets_a_leading_zero(step):
    import random

    seen = {changed(step, random.Random(seed)) for seed in range(300)}
    assert step not in seen
    assert all(sum(a != b for a, b in zip(step, other, strict=True)) == 1 for other in seen)
    assert not any(" 0" in f" {other}" and len(step) > 1 for other in seen)


def test_rows_without_an_answer_are_named(tmp_path):
    path = tmp_path / "gsm.jsonl"
    path.write_text(json.dumps(GSM) + "\n" + json.dumps({"question": "q", "answer": " "}) + "\n")
    with pytest.raises(UserError, match=r"row 2: column 'answer' is empty"):
        CorruptedSteps(str(path)).load("stepwise")
    with pytest.raises(UserError, match="no prompts"):
        CorruptedSteps(str(path)).load("prompts")


def test_real_solutions_have_their_labels_at_the_end_of_each_line(stories, shared):
    """GSM8K through the tokenizer of a real model: the text comes back, and half of the solutions end with a wrong number."""
    rows = CorruptedSteps(str(shared / "gsm8k" / "train-first-2000.jsonl")).load("stepwise")["train"].select(range(200))
    known = {
        row["question"]: row["answer"]
        for row in FileSource(str(shared / "gsm8k" / "train-first-2000.jsonl")).load("prompts")["train"]
    }
    made = solutions(stories, "\n", max_length=10_000)
    tokens = made.encode([rows[i] for i in range(200)], [f"row {i + 1}" for i in range(200)])
    wrong = 0
    for row, encoded in zip(rows, tokens, strict=True):
        text = stories.decode(encoded["input_ids"], skip_special_tokens=True)
        assert text.strip() == (row["prompt"] + "\n".join(row["completions"])).strip()
        assert {stories.decode([encoded["input_ids"][place]]) for place in encoded["label_at"]} == {"\n"}
        assert len(encoded["label_at"]) == len(row["completions"])
        lines = known[row["prompt"].removesuffix("\n")].split("\n")
        true = [step == line.strip() for step, line in zip(row["completions"], lines, strict=False)]
        assert true == [label == 1 for label in row["labels"]]
        wrong += not all(true)
    assert 80 < wrong < 120
