"""Rows of every format become what they say; rows of no format are refused in a few lines that name the place."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import CASES, SAID, junk_tables
from tokenizers_at_hand import TOKENIZERS

from rlhf_lightning.data.files import from_rows
from rlhf_lightning.data.format_table import detect_format
from rlhf_lightning.data.formats import to_canonical
from rlhf_lightning.data.implicit_prompt import split_texts
from rlhf_lightning.data.sources import FileSource
from rlhf_lightning.data.tokenization import tokenize_demonstrations, tokenize_preferences, tokenize_prompts
from rlhf_lightning.errors import UserError

LINES = 11  # of an error: what is wrong, and the first ten rows
KINDS = ["demonstrations", "preferences", "prompts"]
TOKENIZE = {
    "demonstrations": tokenize_demonstrations,
    "preferences": tokenize_preferences,
    "prompts": lambda rows, tokenizer: tokenize_prompts(rows, tokenizer, long_prompts="drop"),
}


def teaches(case, kind):
    """Whether a row that serves a kind also has something to learn."""
    if kind == "preferences":
        return case.preference["chosen"] != case.preference["rejected"]
    return not (kind == "demonstrations" and case.disliked)


@pytest.mark.fuzz(60, 3000)
def test_rows_become_what_they_say(tier):
    @tier
    @given(case=CASES, kind=st.sampled_from(KINDS), id=st.integers(0, 9))
    def holds(case, kind, id):
        rows = from_rows([{**case.row, "id": id}])
        assert detect_format(rows.column_names, rows[0]).name == case.format
        expected = case.expected(kind)
        if expected is not None and teaches(case, kind):
            assert to_canonical(rows, kind).to_list() == [{**expected, "id": id}]
            return
        with pytest.raises(UserError, match="no row is left" if expected is not None else "row 1"):
            to_canonical(rows, kind, origin="f")

    holds()


@pytest.mark.fuzz(40, 800)
def test_two_texts_are_cut_and_nothing_of_them_is_lost(tier):
    @tier
    @given(prompt=SAID, chosen=SAID, rejected=SAID)
    def holds(prompt, chosen, rejected):
        chosen, rejected = f"{prompt} {chosen}", f"{prompt} {rejected}"
        try:
            shared, good, bad = split_texts(chosen, rejected)
        except UserError:
            assert len(prompt.split()) <= 1  # the only shared word is part of the response
            return
        assert (shared + good, shared + bad) == (chosen, rejected)
        assert shared.strip()
        assert good
        assert bad

    holds()


@pytest.mark.fuzz(40, 2000)
def test_junk_is_refused_by_place(tier, tmp_path, in_process):
    path = tmp_path / "junk.jsonl"

    @tier
    @given(rows=junk_tables(), kind=st.sampled_from(KINDS), tokenizer=st.sampled_from(sorted(TOKENIZERS)))
    def holds(rows, kind, tokenizer):
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        canonical = told = None
        try:
            canonical = to_canonical(FileSource(str(path)).load(kind)["train"], kind, origin=str(path))
            TOKENIZE[kind](canonical, TOKENIZERS[tokenizer])
        except UserError as error:
            told = str(error)
        places = str(path) if canonical is None else ("row ", "no row is left")
        assert told is None or (told.startswith(places) and len(told.splitlines()) <= LINES)

    holds()
