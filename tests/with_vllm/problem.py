"""A policy, prompts, and what plain transformers forwards say of both: the oracle that vLLM is held against."""

import importlib.util
from itertools import count

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

PAD, VOCABULARY = 0, 24
NEVER: list[int] = []  # no token ends a response
PROMPTS = ([4, 5, 6, 7], [8, 9], [10, 3, 3])
LONGEST = 96
VERSIONS = count()  # of the weights, over all tests
SMALL = {"enforce_eager": True, "max_num_seqs": 64, "block_size": 32}  # a quick start, and prompts fill a cached block

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm")


def policy(seed=3, **fields):
    """A small Llama far from uniform, whose folder asks for another way of sampling altogether."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"vocab_size": VOCABULARY, "max_position_embeddings": LONGEST, "tie_word_embeddings": True} | fields
    network = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    change(network, seed, keep=0.0)
    network.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.3,
        top_k=2,
        top_p=0.5,
        repetition_penalty=3.0,
        eos_token_id=[4, 9],
        max_new_tokens=3,
    )
    return network


@torch.no_grad()
def change(network, seed, keep=1.0, by=0.12):
    """Other weights, as after an update."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.mul_(keep).add_(torch.empty_like(parameter).normal_(std=by, generator=generator))


def left_padded(prompts=PROMPTS, extra=0, garbage=PAD):
    """Token ids and mask, both of shape (batch, length)."""
    width = max(map(len, prompts)) + extra
    ids = torch.tensor([[garbage] * (width - len(p)) + p for p in prompts])
    lengths = torch.tensor([len(p) for p in prompts])
    return ids, torch.arange(width) >= (width - lengths)[:, None]


def drawn(engine, network, sampling, ends=NEVER, prompts=PROMPTS, **layout):
    """What the engine draws."""
    return engine.generate(network, *left_padded(prompts, **layout), sampling, eos_ids=list(ends), pad_id=PAD)


@torch.no_grad()
def logprobs_of(network, prompt, response, temperature=1.0):
    """Each response token's log-probability, of one row without padding; shape (response,)."""
    ids = torch.tensor([[*prompt, *response]])
    logits = network(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)


@torch.no_grad()
def greedy_by_hand(network, prompt, steps, ends):
    """The argmax, token by token."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(network(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]
