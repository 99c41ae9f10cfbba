"""What preparing rows does, counted: calls of the tokenizer, compiled templates and Python calls a row; never seconds.

The figures that these counts stand for are printed by ``benchmarks/preparation.py``.
"""

import datetime
import gc
import random
import sys

import pytest
from datasets import Dataset, DatasetDict
from jinja2 import Environment
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.data import chat, encoding
from rlhf_lightning.data.collector import older_objects_frozen
from rlhf_lightning.data.demonstrations import DemonstrationDataModule
from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.rankings import RankingDataModule
from rlhf_lightning.data.sources import DatasetSource
from rlhf_lightning.data.splits import Split
from rlhf_lightning.data.stepwise import StepwiseDataModule
from rlhf_lightning.data.template_inputs import TemplateInputs
from rlhf_lightning.data.tokenizers import encode_beginnings
from rlhf_lightning.data.unpaired import UnpairedDataModule
from tests.chat_templates import CONVERSATIONS, TEMPLATES, TOOL, bot, byte_tokenizer, user

COUNTED = ("rlhf_lightning", "transformers", "jinja2", "<template>")  # packages whose functions are counted


def asked(rng):
    """A question that hardly any other row has."""
    return [user(" ".join(rng.choices("abcdef", k=12)))]


def answer(rng):
    return [bot(" ".join(rng.choices("abcdef", k=9)))]


def demonstration(rng):
    return {"prompt": asked(rng), "completion": answer(rng)}


def pair(rng):
    return {"prompt": asked(rng), "chosen": answer(rng), "rejected": answer(rng)}


def ranking(rng):
    return {"prompt": asked(rng), "completions": [answer(rng) for _ in range(4)], "ranks": [0, 1, 2, 3]}


def labelled(rng):
    return {"prompt": asked(rng), "completion": answer(rng), "label": rng.random() < 0.5}


def conversation(rng):
    return {"messages": [*asked(rng), *answer(rng), *asked(rng), *answer(rng)]}


def solution(rng):
    steps = [" ".join(rng.choices("abcde", k=5)) for _ in range(3)]
    return {"prompt": "a b", "completions": steps, "labels": [True, True, False]}


# Each with the Python calls that a row may need. The comments: what it needed when this was written, and before templates were
# looked up once.
KINDS = {
    "demonstrations": (demonstration, DemonstrationDataModule, {}, 190),  # 145, 255
    "pairs": (pair, PreferenceDataModule, {}, 286),  # 220, 371
    "rankings": (ranking, RankingDataModule, {}, 470),  # 365, 592
    "unpaired": (labelled, UnpairedDataModule, {}, 186),  # 143, 254
    "prompts": (lambda rng: {"prompt": asked(rng)}, PromptDataModule, {}, 90),  # 68, 137
    "conversations": (conversation, DemonstrationDataModule, {"mask": "assistant"}, 240),  # 202, 271
    "solutions": (solution, StepwiseDataModule, {"separator": "f"}, 110),  # 84, 144
}


class Rows(DatasetSource):
    """Rows with the tokenizer of a test."""

    def __init__(self, rows, tokenizer):
        super().__init__(DatasetDict({"train": Dataset.from_list(rows)}))
        self.own = tokenizer

    def tokenizer(self):
        return self.own


def prepare(kind, count, tokenizer):
    make, module, settings, _ = KINDS[kind]
    rng = random.Random(f"{kind} {count}")
    data = module(Rows([make(rng) for _ in range(count)], tokenizer), split=Split(validation=0), **settings)
    data.prepare_data()
    assert len(data.rows["train"]) == count
    return data


@pytest.fixture
def counted(monkeypatch):
    """How often the tokenizer, the compiler of templates and the look-up of a template are called; calls go through."""
    counts = {"tokenizer": 0, "compiler": 0, "look-up": 0}

    def count(owner, attribute, name):
        inner = getattr(owner, attribute)

        def counting(*args, **kwargs):
            counts[name] += 1
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, attribute, counting)

    count(PreTrainedTokenizerFast, "get_chat_template", "look-up")
    count(Environment, "compile", "compiler")
    count(encoding, "encode_beginnings", "tokenizer")
    count(encoding, "encode_continuations", "tokenizer")
    return counts


@pytest.mark.parametrize("kind", list(KINDS))
def test_calls_do_not_grow_with_the_rows(kind, word, counted):
    """Rows of one block; a thousand rows are one block."""
    found = []
    for rows in (20, 90):
        before = dict(counted)
        prepare(kind, rows, word)
        found.append({name: counted[name] - before[name] for name in counted})
    assert found[0]["tokenizer"] == found[1]["tokenizer"] == 2
    assert found[0]["look-up"] == found[1]["look-up"] <= 3
    assert found[1]["compiler"] == 0  # compiled before


def python_calls(function):
    """Number of calls of the packages' functions, generators' steps included."""
    calls = 0

    def profile(frame, event, argument):
        nonlocal calls
        calls += event == "call" and any(name in frame.f_code.co_filename for name in COUNTED)

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_row_needs_few_python_calls(kind, word):
    prepare(kind, 10, word)  # what is looked up once
    few, many = (python_calls(lambda rows=rows: prepare(kind, rows, word)) for rows in (40, 240))
    assert (many - few) / 200 <= KINDS[kind][-1]


def test_equal_texts_are_encoded_once(word, monkeypatch):
    texts = []
    encode = encoding.encode_beginnings

    def counting(tokenizer, given):
        texts.extend(given)
        return encode(tokenizer, given)

    monkeypatch.setattr(encoding, "encode_beginnings", counting)
    rows = [("a b", "c"), ("a b", "d"), ("a", "c"), ("a b", "c")]
    found = encoding.encode_pairs(word, *([row[side] for row in rows] for side in (0, 1)))
    assert texts == ["a b", "a"]
    assert [ids.prompt_ids for ids in found] == [[1, 6, 7], [1, 6, 7], [1, 6], [1, 6, 7]]
    assert [ids.response_ids for ids in found] == [[8, 2], [9, 2], [8, 2], [8, 2]]
    found[0].prompt_ids.append(0)  # no row shares a list with another
    found[0].response_ids.append(0)
    assert (found[3].prompt_ids, found[3].response_ids) == ([1, 6, 7], [8, 2])


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_plain_conversations_are_rendered_as_transformers_renders_them(template):
    tokenizer = byte_tokenizer(TEMPLATES[template])
    turns = [user("Hello {{ x }} <b>"), bot("Hi."), user("And\n you?"), bot("Fine, thanks.")]
    renderer = chat.Renderer(tokenizer)
    for messages in (turns, turns[:1], turns[:3]):
        for prompted in (False, True):
            theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted)
            assert renderer.text(messages, generation_prompt=prompted) == theirs


@pytest.mark.parametrize("name", list(CONVERSATIONS))
def test_conversations_with_more_than_text_are_rendered_as_transformers_renders_them(name):
    tokenizer = byte_tokenizer(TEMPLATES["strips reasoning"])
    renderer = chat.Renderer(tokenizer).given(TemplateInputs([TOOL], None))
    messages = CONVERSATIONS[name]
    theirs = tokenizer.apply_chat_template(messages, tools=[TOOL], tokenize=False)
    assert renderer.text(messages) == theirs


def test_a_variable_that_is_not_plain_reaches_the_template_as_transformers_gives_it():
    tokenizer = byte_tokenizer("{{ today }} {{ flags | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}")
    variables = {"today": datetime.date(2026, 1, 2), "flags": {"on": [True, None]}}
    theirs = tokenizer.apply_chat_template([user("x")], tokenize=False, **variables)
    assert theirs == '<date> {"on": [true, null]}x'
    assert chat.Renderer(tokenizer, TemplateInputs(None, variables)).text([user("x")]) == theirs
    base = chat.Renderer(tokenizer)
    assert base.given(TemplateInputs(None, {"today": "now", "flags": 1})).text([user("x")]) == "now 1x"


@pytest.mark.parametrize("state", ["truncation", "padding", "split special tokens"])
def test_ids_are_those_of_the_tokenizer_whatever_state_its_backend_is_in(word, state):
    if state == "truncation":
        word.backend_tokenizer.enable_truncation(2)
    elif state == "padding":
        word.backend_tokenizer.enable_padding(length=9)
    else:
        word.split_special_tokens = True
    texts = ["a b c d", "<eos> e", "f"]
    expected = [[6, 7, 8, 9], [2, 10], [11]]
    assert word(texts, add_special_tokens=False).input_ids == expected or state == "split special tokens"
    assert encode_beginnings(word, texts) == word(texts, add_special_tokens=False).input_ids


def test_a_tokenizer_with_python_of_its_own_is_called(word):
    class Shouting(PreTrainedTokenizerFast):
        def _encode_plus(self, text, *args, **kwargs):
            return super()._encode_plus([part.lower() for part in text], *args, **kwargs)

    shouting = Shouting(tokenizer_object=word.backend_tokenizer, unk_token="<unk>")
    assert encode_beginnings(shouting, ["A B"]) == [[6, 7]]


def test_the_collector_is_left_as_it_was():
    with older_objects_frozen():
        assert gc.get_freeze_count()
        with older_objects_frozen():  # a second one does not end the first
            pass
        assert gc.get_freeze_count()
    assert not gc.get_freeze_count()
    with pytest.raises(ValueError, match="x"), older_objects_frozen():
        raise ValueError("x")
    assert not gc.get_freeze_count()
