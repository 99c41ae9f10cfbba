"""The sampling options in vLLM: the same responses as from the native engine, stop strings found while it generates."""

import logging
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.generation.native import NativeEngine
from rlhf_lightning.generation.vllm_engine import VLLMEngine
from rlhf_lightning.generation.vllm_server import VLLMServerEngine
from rlhf_lightning.models.attention import use_rows
from rlhf_lightning.rollouts.collect import generate_responses
from tests.with_vllm.problem import PROMPTS, SMALL, VERSIONS, VOCABULARY, drawn, left_padded, needs_vllm, policy

pytestmark = [needs_vllm, pytest.mark.slow]
GREEDY = SamplingParameters(max_new_tokens=12, temperature=0.0)


@pytest.fixture
def network():
    model = policy()
    use_rows(model)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    """A letter a token, from a at id 4 on."""
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *"abcdefghijklmnopqrst"]
    assert len(names) == VOCABULARY
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 1.8}, {"min_new_tokens": 6}, {"repetition_penalty": 0.8, "min_new_tokens": 4}],
    ids=str,
)
def test_greedy_responses_are_those_of_the_native_engine(take, network, options):
    engine = take(network)
    plain = drawn(NativeEngine(), network, GREEDY).tokens
    end = [int(plain[0, 2])]
    native, theirs = (drawn(e, network, replace(GREEDY, **options), ends=end).tokens for e in (NativeEngine(), engine))
    assert torch.equal(native, theirs)
    short = drawn(engine, network, GREEDY, ends=end).tokens
    assert native.shape != short.shape or not torch.equal(native, short)


@pytest.mark.parametrize("options", [{"min_p": 0.25}, {"min_p": 0.2, "top_k": 4}], ids=str)
def test_min_p_keeps_the_tokens_that_transformers_keeps(take, network, options):
    prompt = PROMPTS[0]
    with torch.no_grad():
        p = torch.softmax(network(input_ids=torch.tensor([prompt])).logits[0, -1], -1)
    kept = (p >= options["min_p"] * p.max()).nonzero().flatten().tolist()
    kept = sorted(kept, key=lambda token: -p[token])[: options.get("top_k", VOCABULARY)]
    assert 1 < len(kept) < 15
    torch.manual_seed(0)
    tokens = drawn(take(network), network, SamplingParameters(1, **options), prompts=[prompt] * 600).tokens
    assert set(tokens[:, 0].tolist()) == set(kept)


def responses(engine, network, tokenizer, sampling):
    engine.expect(sampling)
    engine.take_weights(network, tokenizer, next(VERSIONS))
    batch = PromptBatch(*left_padded(), prompts=["?"] * len(PROMPTS), columns={})
    return generate_responses(batch, network, tokenizer, engine, sampling)


def check_stops(engine, network, tokenizer):
    """Greedy responses of an engine with stop strings, against the native engine's; how many tokens it generated."""
    free = drawn(NativeEngine(), network, replace(GREEDY, max_new_tokens=30)).tokens
    first = tokenizer.decode(free[0, 4:6])
    sampling = replace(GREEDY, max_new_tokens=30, stop_strings=[first])
    expected = responses(NativeEngine(), network, tokenizer, sampling)
    found = responses(engine, network, tokenizer, sampling)
    assert found.samples == expected.samples
    assert found.samples.completions[0].endswith(first)
    assert len(found.samples.completion_ids[0]) <= 6
    return found.drawn.tokens.shape[1], expected.drawn.tokens.shape[1], (found.drawn.tokens[0] != 0).sum()


def test_a_vllm_with_the_tokenizer_stops_where_the_native_engine_does(network, tokenizer):
    engine = VLLMEngine(kv_cache_gib=0.125, options=SMALL)
    try:
        width, expected, length = check_stops(engine, network, tokenizer)
        assert (width, length <= 6) == (expected, True)
    finally:
        engine.close()


def test_a_server_without_a_tokenizer_generates_on_and_says_so_and_the_response_is_cut(
    server, network, tokenizer, caplog
):
    with caplog.at_level(logging.WARNING):
        *_, length = check_stops(VLLMServerEngine(server.url), network, tokenizer)
    assert length > 6
    assert "start it without --skip-tokenizer-init" in caplog.text


def test_a_server_with_a_tokenizer_stops_at_once(start_server, network, tokenizer):
    server = start_server(tokenizer=tokenizer)
    *_, length = check_stops(VLLMServerEngine(server.url), network, tokenizer)
    assert length <= 6
