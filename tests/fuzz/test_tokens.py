"""No token is lost between text and mask: what is learnt decodes to what was said, and the whole to what the template wrote."""

import logging

import pytest
from datasets import Dataset
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import RARELY_LONG, SAID, message, prompts
from tokenizers_at_hand import TOKENIZERS

from rlhf_lightning.data.tokenization import tokenize_demonstrations, tokenize_preferences, tokenize_prompts
from rlhf_lightning.errors import UserError

LONGEST = 10**6
EXACT = ["chatml", "gpt2", "llama"]  # decoding undoes encoding; SentencePiece puts spaces behind special tokens


def one(dataset):
    (row,) = dataset
    return row


def without_end(text, eos):
    """What an answer says apart from EOS that its author wrote behind it."""
    return without_end(text.rstrip()[: -len(eos)], eos) if text.rstrip().endswith(eos) else text


def marks(tokenizer):
    return {
        tokenizer.convert_tokens_to_ids(token)
        for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>")
    }


def as_written(tokenizer, messages):
    """What the template writes, up to the last EOS; with harmless letters in place of what was said, to count markers."""
    said = [
        {**m, "content": without_end(m["content"], tokenizer.eos_token) if m["role"] == "assistant" else m["content"]}
        for m in messages
    ]
    text = tokenizer.apply_chat_template(said, tokenize=False)
    bare = tokenizer.apply_chat_template([{**m, "content": "t"} for m in messages], tokenize=False)
    ids = tokenizer(bare.rstrip(), add_special_tokens=False).input_ids
    return text.rstrip(), [token for token in ids if token in marks(tokenizer)]


@pytest.mark.fuzz(30, 600)
def test_a_conversation_is_what_the_template_writes_and_its_answers_are_learnt(tier, in_process):
    @tier
    @given(prompt=prompts(), answer=SAID, name=st.sampled_from(EXACT), whole=st.booleans())
    def holds(prompt, answer, name, whole):
        tokenizer = TOKENIZERS[name]
        eos = tokenizer.eos_token
        messages = [*prompt, message("assistant", answer)]
        row = {"messages": messages} if whole else {"prompt": prompt, "completion": messages[-1:]}
        text, markers = as_written(tokenizer, messages)
        answers = [without_end(m["content"], eos) + eos for m in messages if m["role"] == "assistant"]
        for mask, learnt in (("completion", answers[-1]), ("assistant", "".join(answers))):
            made = one(tokenize_demonstrations(Dataset.from_list([row]), tokenizer, mask=mask, max_length=LONGEST))
            ids, flags = made["input_ids"], made["response_mask"]
            assert len(ids) == len(flags) == made["length"]
            assert sum(flags) == made["supervised"]
            assert tokenizer.decode(ids) == text
            assert [token for token in ids if token in marks(tokenizer)] == markers  # what was said makes none
            assert tokenizer.decode([token for token, flag in zip(ids, flags, strict=True) if flag]) == learnt

    holds()


@pytest.mark.fuzz(30, 600)
def test_a_text_answer_follows_its_prompt_and_ends_once(tier, in_process):
    @tier
    @given(
        prompt=SAID, answer=SAID, name=st.sampled_from(EXACT), mask=st.sampled_from(["completion", "assistant", "all"])
    )
    def holds(prompt, answer, name, mask):
        tokenizer = TOKENIZERS[name]
        bos, eos = tokenizer.bos_token, tokenizer.eos_token
        row = Dataset.from_list([{"prompt": prompt, "completion": answer}])
        made = one(tokenize_demonstrations(row, tokenizer, mask=mask, max_length=LONGEST))
        ids, flags = made["input_ids"], made["response_mask"]
        begun = begin_once(prompt, bos, name == "llama")
        start = len(
            one(tokenize_prompts(Dataset.from_list([{"prompt": prompt}]), tokenizer, max_prompt_length=LONGEST))[
                "prompt_ids"
            ]
        )
        assert tokenizer.decode(ids[:start]) == begun
        assert tokenizer.decode(ids[start:]) == without_end(answer, eos) + eos
        assert ids[start:].count(tokenizer.eos_token_id) == 1
        assert flags == [mask == "all" and place > 0 for place in range(start)] + [True] * (len(ids) - start)

    holds()


def begin_once(text, bos, always):
    """With one BOS in front, where there is to be one or there is one."""
    rest = text
    while bos and rest.startswith(bos):
        rest = rest[len(bos) :]
    return bos + rest if bos and (always or rest != text) else text


@pytest.mark.fuzz(20, 300)
def test_plain_text_is_learnt_from_its_second_token_to_its_only_end(tier, in_process):
    @tier
    @given(text=SAID, name=st.sampled_from(["chatml", "llama"]))
    def holds(text, name):
        tokenizer = TOKENIZERS[name]
        eos = tokenizer.eos_token
        rows = Dataset.from_list([{"text": text}])
        while text.endswith(eos):
            text = text.removesuffix(eos)
        assume(text or name == "llama")  # without BOS nothing comes before a lone EOS
        made = one(tokenize_demonstrations(rows, tokenizer, max_length=LONGEST))
        assert tokenizer.decode(made["input_ids"]) == begin_once(text, tokenizer.bos_token, name == "llama") + eos
        assert made["response_mask"] == [False] + [True] * (made["length"] - 1)

    holds()


@pytest.mark.fuzz(20, 300)
def test_an_answer_after_a_leading_space_tokenizer_is_neither_moved_nor_lost(tier, in_process):
    tokenizer = TOKENIZERS["sentencepiece"]

    @tier
    @given(prompt=prompts(), good=SAID, bad=SAID)
    def holds(prompt, good, bad):
        assume("▁" not in good + bad)  # which it writes for a space
        answers = {"chosen": [message("assistant", good)], "rejected": [message("assistant", bad)]}
        made = one(
            tokenize_preferences(Dataset.from_list([{"prompt": prompt, **answers}]), tokenizer, max_length=LONGEST)
        )
        for side, said in (("chosen_ids", good), ("rejected_ids", bad)):
            assert made[side].count(tokenizer.eos_token_id) == 1
            both = tokenizer.decode(made["prompt_ids"] + made[side])
            assert both.removeprefix(tokenizer.decode(made["prompt_ids"])) == without_end(said, "</s>") + "</s>"
        assert made["prompt_ids"].count(tokenizer.bos_token_id) == 1

    holds()


@pytest.mark.fuzz(15, 200)
def test_what_is_too_long_is_cut_left_out_or_refused_and_counted(tier, in_process, caplog):
    tokenizer = TOKENIZERS["chatml"]
    caplog.set_level(logging.WARNING)

    @tier
    @given(rows=st.lists(st.tuples(SAID, SAID), min_size=1, max_size=4), limit=st.integers(1, 40))
    def holds(rows, limit):
        table = Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in rows])
        full = tokenize_demonstrations(table, tokenizer, max_length=LONGEST).to_list()
        long = [row for row in full if row["length"] > limit]
        cut = [(row["input_ids"][:limit], row["response_mask"][:limit]) for row in full]
        cases = {
            "right": [(ids, mask) for ids, mask in cut if any(mask)],
            "drop": [(row["input_ids"], row["response_mask"]) for row in full if row["length"] <= limit],
            "error": [] if long else cut,
        }
        for truncation, expected in cases.items():
            caplog.clear()
            try:
                made = tokenize_demonstrations(table, tokenizer, max_length=limit, truncation=truncation)
            except UserError:
                made = []
            assert [(row["input_ids"], row["response_mask"]) for row in made] == expected
            if long and truncation == "right" and expected:
                assert f"cut {len(long)} of {len(full)} demonstrations after {limit} tokens" in caplog.text
            if 0 < len(expected) < len(full):
                assert "left out" in caplog.text

    holds()


@pytest.mark.fuzz(10, 200)
def test_a_row_gets_the_same_tokens_alone_in_company_and_again(tier, in_process):
    @tier
    @given(
        rows=st.lists(st.tuples(prompts(), SAID, RARELY_LONG), min_size=2, max_size=4),
        name=st.sampled_from(sorted(TOKENIZERS)),
    )
    def holds(rows, name):
        pairs = [
            {"prompt": prompt, "chosen": [message("assistant", good)], "rejected": [message("assistant", bad or ".")]}
            for prompt, good, bad in rows
        ]
        together = tokenize_preferences(Dataset.from_list(pairs), TOKENIZERS[name], max_length=LONGEST).to_list()
        alone = [one(tokenize_preferences(Dataset.from_list([p]), TOKENIZERS[name], max_length=LONGEST)) for p in pairs]
        assert together == alone
        assert (
            tokenize_preferences(Dataset.from_list(pairs), TOKENIZERS[name], max_length=LONGEST).to_list() == together
        )

    holds()
