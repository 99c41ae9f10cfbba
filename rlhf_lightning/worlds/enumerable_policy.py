"""Tokenizer and reference policy of the enumerable world."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PhiConfig, PhiForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

PAD, EOS, UNK = range(3)
NEVER = -1e4  # as a logit: a probability of exactly zero in float32, and no gradient
WIDTH, LAYERS, HEADS, SPREAD = 64, 2, 4, 0.08


def small_tokenizer(prompt_symbols: int, words: int) -> PreTrainedTokenizerFast:
    """One token a word: special tokens, then the symbols of prompts (x0, x1, ...), then those of responses (a0, a1, ...)."""
    symbols = [f"x{i}" for i in range(prompt_symbols)] + [f"a{i}" for i in range(words)]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *symbols])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.chat_template = "{{ raise_exception('the prompts of this world are plain text, not messages') }}"
    return tokenizer


def reference_policy(tokenizer: PreTrainedTokenizerFast, tokens: list[int], seed: int) -> PreTrainedModel:
    """A causal transformer, random but opinionated (its head is scaled by two), that says nothing but these tokens.

    Phi, because its head has a bias: that is how everything outside the response's tokens gets probability zero, so that
    the enumerated responses are all there is. Weights are drawn by name order from a generator of its own: the same in
    every process, whatever the library's own initialisation.

    Args:
        tokenizer: Of the world.
        tokens: What a response may hold.
        seed: Of the weights.
    """
    config = PhiConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=32,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):  # the library's draws, which are replaced, leave no trace
        network = PhiForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(network.named_parameters()):
            if weight.dim() > 1:
                weight.normal_(std=1.0 if "embed" in name else SPREAD, generator=generator)
        network.lm_head.weight.mul_(2)
        network.lm_head.bias.fill_(NEVER)[tokens] = 0.0
    return network
