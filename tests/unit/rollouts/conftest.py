"""A tiny policy, a critic, and an engine that gives back what it is told to."""

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.spec import ModelSpec

torch.set_num_threads(1)  # threads that wait for each other cost more than they give

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}


@pytest.fixture
def tokenizer():
    """<pad> 0, <bos> 1, <eos> 2, <unk> 3, then a to h from 4 on."""
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *"abcdefgh"]
    backend = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def widened(network, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.35, generator=generator)
    return network


@pytest.fixture
def networks(tokenizer):
    """Policy, another policy, and a scalar model."""
    spec = ModelSpec(architecture=GPT2)
    return (
        widened(load_causal_lm(spec, tokenizer), 1),
        widened(load_causal_lm(spec, tokenizer), 2),
        widened(load_scalar_model(spec, tokenizer, new_head=True), 3),
    )
