"""Small tokenizers of the manners that there are: bytes with and without BOS, chat markers, SentencePiece's leading space."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.data.chat import DEFAULT_CHAT_TEMPLATE
from rlhf_lightning.data.tokenizers import repair_pad_token

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def special(names):
    return [AddedToken(name, special=True, normalized=False) for name in names]


def of_bytes(*names):
    """As in GPT-2: every byte is a token, "hi" and two spaces are merged."""
    vocabulary = {name: i for i, name in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "hi", "ĠĠ"])}
    backend = Tokenizer(models.BPE(vocabulary, [("h", "i"), ("Ġ", "Ġ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special(names))
    return backend


def gpt2():
    """BOS is EOS and stands nowhere; the headers of the default template are plain text."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=of_bytes("<|endoftext|>"), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    return tokenizer


def chatml():
    """EOS ends every turn."""
    backend = of_bytes("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def llama():
    """BOS is put in front by the tokenizer and by the template."""
    backend = of_bytes("<s>", "</s>", "<pad>")
    bos = [("<s>", backend.token_to_id("<s>"))]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=bos)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = "{{ bos_token }}" + DEFAULT_CHAT_TEMPLATE
    return tokenizer


def sentencepiece():
    """A space is put before every text, unknown characters are spelt in bytes, and "</s>" is a word of the model."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abt<>/s#:", "▁a"]
    vocabulary = {name: i for i, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(special(["<unk>", "<s>", "</s>"]))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    tokenizer.chat_template = "{{ bos_token }}" + DEFAULT_CHAT_TEMPLATE
    return tokenizer


TOKENIZERS = {make.__name__: make() for make in (gpt2, chatml, llama, sentencepiece)}
for tokenizer in TOKENIZERS.values():
    repair_pad_token(tokenizer)
