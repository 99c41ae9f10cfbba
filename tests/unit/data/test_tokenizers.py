"""Loading, telling apart and repairing tokenizers."""

import copy

import pytest

from rlhf_lightning.data.tokenizers import (
    load_tokenizer,
    repair_pad_token,
    same_tokenizer,
    tokenizer_fingerprint,
    uses_bos,
)
from rlhf_lightning.errors import UserError


def test_a_saved_tokenizer_is_the_same(word, tmp_path):
    word.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert same_tokenizer(word, loaded) is None
    assert tokenizer_fingerprint(word) == tokenizer_fingerprint(loaded)
    loaded(["a", "a b"], padding=True)  # calls leave traces in the backend that are no part of it
    assert tokenizer_fingerprint(word) == tokenizer_fingerprint(loaded)


def test_each_difference_is_named(word, gpt2):
    assert "entries" in same_tokenizer(word, gpt2)
    other = copy.deepcopy(word)
    other.chat_template += " "
    assert same_tokenizer(word, other) == "chat template differs"
    assert tokenizer_fingerprint(word) != tokenizer_fingerprint(other)
    other = copy.deepcopy(word)
    other.eos_token = "<unk>"
    assert same_tokenizer(word, other) == "special tokens differ: 'eos_token' is '<eos>' and '<unk>'"


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(UserError, match="no tokenizer in this folder"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="neither a folder here"):
        load_tokenizer(str(tmp_path / "absent"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))


def test_a_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no tokenizer could be loaded from 'owner/none'"):
        load_tokenizer("owner/none")


def test_pad_is_repaired_where_missing_or_eos(word, gpt2, chatml, caplog):
    assert not repair_pad_token(word)
    assert caplog.text == ""
    size = len(gpt2)
    assert repair_pad_token(gpt2)
    assert (gpt2.pad_token, gpt2.pad_token_id, len(gpt2)) == ("<|pad|>", size, size + 1)
    assert "pad token is missing" in caplog.text
    chatml.pad_token = chatml.eos_token
    assert repair_pad_token(chatml)
    assert "pad token is EOS" in caplog.text
    assert not repair_pad_token(chatml)
    gpt2.pad_token = None
    assert not repair_pad_token(gpt2)  # the token is there already: no embedding to add
    assert gpt2.pad_token == "<|pad|>"


def test_who_uses_bos(word, gpt2, chatml, bos_adding):
    assert [uses_bos(tokenizer) for tokenizer in (word, gpt2, chatml, bos_adding)] == [True, False, False, True]
