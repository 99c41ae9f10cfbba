"""Tiny tokenizers made on the spot, caches of their own, and the real data where it lies beside the repository."""

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SHARED = Path(__file__).parents[4] / "shared" / "data"

WORLD_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %} <user> {{ m.content }}"
    "{% else %} <assistant> {% generation %}{{ m.content }} {{ eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} <assistant> {% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))


@pytest.fixture
def word():
    """Word-level: <pad> 0, <bos> 1, <eos> 2, <unk> 3, <user> 4, <assistant> 5, then a b c d e f from 6 on."""
    names = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>", *"abcdef"]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=["<user>", "<assistant>"], **special
    )
    tokenizer.chat_template = WORLD_TEMPLATE
    return tokenizer


def byte_level(*special: str) -> Tokenizer:
    """Bytes as in GPT-2, with the merges "h"+"i" and two spaces."""
    vocab = {name: i for i, name in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "hi", "ĠĠ"])}
    backend = Tokenizer(models.BPE(vocab, [("h", "i"), ("Ġ", "Ġ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return backend


@pytest.fixture
def gpt2():
    """As GPT-2: BOS is EOS and is not put in front, there is no pad token and no chat template."""
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(end), bos_token=end, eos_token=end)


@pytest.fixture
def chatml():
    """As Qwen: EOS ends each turn, a newline follows it, and the template has no generation markers."""
    backend = byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def bos_adding():
    """Puts BOS in front by itself, as Llama does, and its chat template writes BOS as well."""
    backend = byte_level("<s>", "</s>", "<pad>")
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = "{{ bos_token }}" + CHATML.replace("<|im_end|>", "</s>").replace("<|im_start|>", "## ")
    return tokenizer


@pytest.fixture
def stories():
    """The real tokenizer of stories260K: SentencePiece-like, with a space put before every text."""
    from rlhf_lightning.data.tokenizers import load_tokenizer

    if not SHARED.exists():
        pytest.skip("no ../shared/data")
    return load_tokenizer(str(SHARED / "stories260K-hf"))


@pytest.fixture
def shared():
    if not SHARED.exists():
        pytest.skip("no ../shared/data")
    return SHARED
