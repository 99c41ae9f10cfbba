"""Ids and masks against values by hand; one BOS, one EOS, and the prompt a prefix, for every manner of tokenizer."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_lightning.data.chat import DEFAULT_CHAT_TEMPLATE, ensure_chat_template
from rlhf_lightning.data.encoding import encode_messages, encode_pair, encode_pairs, encode_prompt, encode_text
from rlhf_lightning.data.tokenizers import continuing_tokenizer, repair_pad_token
from rlhf_lightning.errors import UserError

DIALOGUE = [
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e f"},
]
TOKENIZERS = ["word", "gpt2", "chatml", "bos_adding", "stories"]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    tokenizer = request.getfixturevalue(request.param)
    ensure_chat_template(tokenizer)
    repair_pad_token(tokenizer)
    return tokenizer


def learnt(tokenizer, masked):
    return tokenizer.decode([token for token, true in zip(*masked, strict=True) if true])


def test_word_level_by_hand(word):
    assert encode_pair(word, "a b", "c") == ([1, 6, 7], [8, 2])
    assert encode_pair(word, DIALOGUE[:1], DIALOGUE[1:2]) == ([1, 4, 6, 7, 5], [8, 2])
    assert encode_text(word, "a b") == ([1, 6, 7, 2], [True] * 4)
    ids = [1, 4, 6, 7, 5, 8, 2, 4, 9, 5, 10, 11, 2]
    assistant = [False] * 5 + [True] * 2 + [False] * 3 + [True] * 3
    assert encode_messages(word, DIALOGUE, "assistant") == (ids, assistant)
    assert encode_messages(word, DIALOGUE, "completion") == (ids, [False] * 10 + [True] * 3)
    assert encode_messages(word, DIALOGUE, "all") == (ids, [True] * 13)


def test_byte_level_by_hand(chatml):
    spell = chatml.convert_tokens_to_ids
    start, end, newline = spell(["<|im_start|>", "<|im_end|>", "Ċ"])
    question, answer = ([{"role": role, "content": "hi"}] for role in ("user", "assistant"))
    prompt, response = encode_pair(chatml, question, answer)
    turn = [start, *spell(list("user")), newline, spell("hi"), end, newline]
    assert prompt == [*turn, start, *spell(list("assistant")), newline]
    assert response == [spell("hi"), end]


def test_prompt_ids_are_a_prefix_and_there_is_one_eos(tokenizer):
    for turn in (1, 3):
        prompt, response = encode_pair(tokenizer, DIALOGUE[:turn], DIALOGUE[turn : turn + 1])
        whole = encode_messages(tokenizer, DIALOGUE[: turn + 1], "completion")
        assert prompt + response == whole.ids
        assert encode_prompt(tokenizer, DIALOGUE[:turn]) == prompt
        assert response.count(tokenizer.eos_token_id) == 1
        assert response[-1] == tokenizer.eos_token_id
        assert whole.mask == [False] * len(prompt) + [True] * len(response)


def test_there_is_one_bos_where_the_tokenizer_uses_one(tokenizer):
    ids, _ = encode_messages(tokenizer, DIALOGUE, "assistant")
    prompt, _ = encode_pair(tokenizer, "a", "b")
    for sequence in (ids, prompt, encode_text(tokenizer, "a").ids):
        if tokenizer.bos_token_id is None or tokenizer.bos_token_id == tokenizer.eos_token_id:
            assert sequence[0] != tokenizer.bos_token_id
        else:
            assert sequence[0] == tokenizer.bos_token_id
            assert sequence.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", ["gpt2", "chatml", "stories"])  # word-level joins and "## " headers decode otherwise
def test_the_assistant_mask_covers_content_and_end_of_turn_and_no_header(request, name):
    tokenizer = request.getfixturevalue(name)
    ensure_chat_template(tokenizer)
    eos = tokenizer.eos_token
    assert learnt(tokenizer, encode_messages(tokenizer, DIALOGUE, "assistant")) == f"c{eos}e f{eos}"
    assert learnt(tokenizer, encode_messages(tokenizer, DIALOGUE, "completion")) == f"e f{eos}"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", ["b", "b{eos}", "b{eos}{eos}"])
def test_an_eos_in_the_data_is_not_doubled(request, name, text):
    tokenizer = request.getfixturevalue(name)
    ensure_chat_template(tokenizer)
    eos = tokenizer.eos_token_id
    text = text.format(eos=" " * (name == "word") + tokenizer.eos_token)
    assert encode_pair(tokenizer, "a", text) == encode_pair(tokenizer, "a", "b")
    message = [{"role": "assistant", "content": text}]
    response = encode_pair(tokenizer, DIALOGUE[:1], message).response_ids
    assert response == encode_pair(tokenizer, DIALOGUE[:1], [{"role": "assistant", "content": "b"}]).response_ids
    assert encode_messages(tokenizer, [*DIALOGUE[:1], *message], "assistant").ids[-2:].count(eos) == 1
    assert encode_text(tokenizer, text) == encode_text(tokenizer, "b")


def test_a_bos_in_the_data_is_not_doubled(bos_adding):
    assert encode_pair(bos_adding, "<s>a", "b") == encode_pair(bos_adding, "a", "b")


def test_a_template_whose_turn_end_is_not_eos_gets_eos_once(chatml):
    chatml.eos_token = "<|endoftext|>"
    ids, mask = encode_messages(chatml, DIALOGUE[:2], "assistant")
    assert chatml.decode(ids).endswith("c<|im_end|>\n<|endoftext|>")
    assert learnt(chatml, (ids, mask)) == "c<|im_end|>\n<|endoftext|>"


def test_pad_equal_to_eos_keeps_eos_learnt(gpt2):
    gpt2.pad_token = gpt2.eos_token
    ensure_chat_template(gpt2)
    ids, mask = encode_messages(gpt2, DIALOGUE, "assistant")
    assert [flag for token, flag in zip(ids, mask, strict=True) if token == gpt2.eos_token_id] == [True, True]
    eos = gpt2.eos_token_id
    assert repair_pad_token(gpt2)
    assert gpt2.pad_token_id != gpt2.eos_token_id == eos


@pytest.mark.parametrize(
    ("prompt", "response"),
    [("Once upon", " a time"), ("Once upo", "n a time"), ("hi", "\n\nhi"), ("a ", "b"), ("a", "  b "), ("é", "漢")],
)
@pytest.mark.parametrize("name", ["gpt2", "stories"])
def test_a_response_encoded_apart_decodes_to_the_joined_text(request, name, prompt, response):
    tokenizer = request.getfixturevalue(name)
    ids = encode_pair(tokenizer, prompt, response)
    text = tokenizer.decode(ids.prompt_ids + ids.response_ids, skip_special_tokens=True)
    assert text.removeprefix(" ") == prompt + response


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.text("ab h\ni.", min_size=1), response=st.text("ab h\ni.é", min_size=1))
def test_any_text_survives_the_joint_in_the_real_tokenizer(stories, prompt, response):
    ids = encode_pair(stories, prompt, response)
    assert stories.decode(ids.prompt_ids + ids.response_ids, skip_special_tokens=True) == prompt + response


def test_only_the_real_tokenizer_has_a_leading_space_to_lose(stories, gpt2):
    assert stories(" foo", add_special_tokens=False).input_ids == [410, 272, 347]  # a space too many
    assert continuing_tokenizer(stories).encode(" foo", add_special_tokens=False).ids == [272, 347]
    assert continuing_tokenizer(gpt2) is None


def test_tokens_added_later_are_seen_in_responses(stories):
    encode_pair(stories, "a", "b")
    stories.add_special_tokens({"pad_token": "<|pad|>"})
    assert encode_pair(stories, "a", "b<|pad|>").response_ids[-2] == stories.pad_token_id


def test_many_pairs_are_encoded_as_one(tokenizer):
    prompts, responses = ["a", "b c", "hi"], ["d", " e", "f"]
    expected = [encode_pair(tokenizer, p, r) for p, r in zip(prompts, responses, strict=True)]
    assert encode_pairs(tokenizer, prompts, responses) == expected


def test_the_default_template(gpt2, caplog):
    assert ensure_chat_template(gpt2)
    assert "no chat template" in caplog.text
    assert gpt2.chat_template == DEFAULT_CHAT_TEMPLATE
    assert not ensure_chat_template(gpt2)
    text = gpt2.apply_chat_template(DIALOGUE[:2], tokenize=False)
    assert text == "User:\na b\n\nAssistant:\nc<|endoftext|>\n\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}{{ messages | length }}", "differently"),
        ("{{ raise_exception('roles must alternate') }}", "refuses a conversation of user.*roles must alternate"),
        (None, "no chat template"),
    ],
)
def test_templates_that_cannot_serve(chatml, template, message):
    chatml.chat_template = template
    with pytest.raises(UserError, match=message):
        encode_pair(chatml, DIALOGUE[:1], DIALOGUE[1:2])
    with pytest.raises(UserError, match=message):
        encode_messages(chatml, DIALOGUE, "assistant")


def test_other_mistakes(word, chatml):
    with pytest.raises(UserError, match="both be text or both be messages"):
        encode_pair(word, "a", DIALOGUE[1:2])
    with pytest.raises(UserError, match="no assistant turn"):
        encode_messages(word, DIALOGUE[:1], "assistant")
    with pytest.raises(UserError, match="begins with the assistant"):
        encode_messages(chatml, DIALOGUE[1:2], "assistant")
    word.eos_token = None
    with pytest.raises(UserError, match="no EOS"):
        encode_pair(word, "a", "b")


def test_generation_markers_agree_with_rendering_turn_by_turn(gpt2):
    gpt2.chat_template = DEFAULT_CHAT_TEMPLATE
    marked = encode_messages(gpt2, DIALOGUE, "assistant")
    gpt2.chat_template = DEFAULT_CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert encode_messages(gpt2, DIALOGUE, "assistant") == marked


def test_the_mask_agrees_with_transformers(chatml):
    """With markers around content and end of turn, transformers' own mask, which maps characters to tokens."""
    chatml.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
        "{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    theirs = chatml.apply_chat_template(DIALOGUE, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encode_messages(chatml, DIALOGUE, "assistant")
    assert [*ids, theirs["input_ids"][-1]] == theirs["input_ids"]  # ours ends at EOS, without the newline
    assert [*map(int, mask), 0] == theirs["assistant_masks"]
