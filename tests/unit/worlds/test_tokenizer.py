"""The tokenizer: one token a word, there and back; a chat template whose prompt is a prefix and whose mask is exact."""

import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from rlhf_lightning.worlds import world_tokenizer
from rlhf_lightning.worlds.acts import sentences
from rlhf_lightning.worlds.tokenizer import SPECIAL_TOKENS, vocabulary

USER = {"role": "user", "content": "what is two plus three ?"}
ASSISTANT = {"role": "assistant", "content": "no , it is five . have a nice day ."}


@pytest.fixture(scope="module", params=["made", "saved and loaded"])
def tokenizer(request, tmp_path_factory):
    if request.param == "made":
        return world_tokenizer()
    folder = tmp_path_factory.mktemp("tokenizer")
    world_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_vocabulary(tokenizer):
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(6)] == list(SPECIAL_TOKENS)
    assert len(tokenizer) == len(vocabulary()) == len(set(vocabulary())) == 142
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.model_max_length == 128


def test_conversation_renders_every_special_token_once(tokenizer):
    text = "<bos> <user> what is two plus three ? <assistant> no , it is five . have a nice day . <eos>"
    assert tokenizer.apply_chat_template([USER, ASSISTANT], tokenize=False) == text
    ids = tokenizer.apply_chat_template([USER, ASSISTANT])["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == text.split()
    assert tokenizer(text)["input_ids"] == ids  # tokenizing adds nothing


def test_prompt_is_a_prefix_and_the_answer_comes_back_word_for_word(tokenizer):
    prompt = tokenizer.apply_chat_template([USER], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template([USER, ASSISTANT])["input_ids"]
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(whole[len(prompt) :], skip_special_tokens=True) == ASSISTANT["content"]


def test_mask_covers_the_answers_and_their_eos(tokenizer):
    turns = [USER, ASSISTANT, USER, ASSISTANT]
    out = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    answer = [*ASSISTANT["content"].split(), "<eos>"]
    tokens = tokenizer.convert_ids_to_tokens(out["input_ids"])
    assert [token for token, marked in zip(tokens, out["assistant_masks"], strict=True) if marked] == answer * 2


def test_several_turns_open_once_and_end_with_the_assistants_turn(tokenizer):
    text = tokenizer.apply_chat_template([USER, ASSISTANT, USER], tokenize=False, add_generation_prompt=True)
    assert text.endswith("have a nice day . <eos> <user> what is two plus three ? <assistant>")
    assert text.count("<bos>") == 1


def test_system_messages_are_refused(tokenizer):
    with pytest.raises(TemplateError, match="user and assistant, not system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "sure ."}, USER])


def test_every_sentence_goes_there_and_back(tokenizer):
    for text in sentences():
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_words_of_no_world_are_unknown(tokenizer):
    assert tokenizer("it is magenta .")["input_ids"][2] == tokenizer.unk_token_id
