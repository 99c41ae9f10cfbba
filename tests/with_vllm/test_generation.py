"""What vLLM draws, in a process of ours and as a server, against plain forwards of the policy."""

import pytest
import torch

from rlhf_lightning.generation.engine import SamplingParameters
from tests.with_vllm.problem import (
    LONGEST,
    NEVER,
    PAD,
    PROMPTS,
    VERSIONS,
    VOCABULARY,
    change,
    drawn,
    greedy_by_hand,
    left_padded,
    logprobs_of,
    needs_vllm,
)

pytestmark = [needs_vllm, pytest.mark.slow]
GREEDY = SamplingParameters(max_new_tokens=8, temperature=0.0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_policy_after_each_of_several_updates(take, network, temperature):
    sampling, before = SamplingParameters(max_new_tokens=12, temperature=temperature), None
    prompts = [list(prompt) for prompt in PROMPTS for _ in range(4)]
    for update in range(4):
        engine = take(network)
        generation = drawn(engine, network, sampling, prompts=prompts)
        for row, prompt in enumerate(prompts):
            tokens = generation.tokens[row].tolist()
            expected = logprobs_of(network, prompt, tokens, temperature)
            torch.testing.assert_close(generation.logprobs[row], expected, rtol=0, atol=1e-4)
            if before is not None:  # had it kept its weights, it would show
                assert (logprobs_of(before, prompt, tokens, temperature) - expected).abs().max() > 0.05
        before = type(network)(network.config).eval()
        before.load_state_dict(network.state_dict())
        change(network, seed=update, by=0.05)


def test_keys_and_values_of_old_weights_are_forgotten(take, network):
    prompt = [5, 6, 7, 8, 9, 10, 11] * 10  # more than two blocks of the cache
    for update in range(3):
        generation = drawn(take(network), network, SamplingParameters(max_new_tokens=6), prompts=[prompt] * 4)
        for tokens, logprobs in zip(generation.tokens.tolist(), generation.logprobs, strict=True):
            torch.testing.assert_close(logprobs, logprobs_of(network, prompt, tokens), rtol=0, atol=1e-4)
        change(network, seed=update, by=0.05)


def test_the_same_version_is_not_asked_for_twice(engine, network, monkeypatch):
    version = next(VERSIONS)
    engine.take_weights(network, None, version)
    monkeypatch.setattr(engine.transfer, "send", lambda *_: pytest.fail("the weights were sent again"))
    engine.take_weights(network, None, version)


@pytest.mark.parametrize("layout", [{}, {"extra": 3}, {"extra": 3, "garbage": 11}])
def test_greedy_is_the_argmax_loop_whatever_the_padding(take, network, layout):
    generation = drawn(take(network), network, GREEDY, **layout)
    expected = [greedy_by_hand(network, prompt, 8, []) for prompt in PROMPTS]
    assert generation.tokens.tolist() == expected
    assert generation.logprobs is None  # nothing was drawn from the policy
    assert len({tuple(row) for row in expected}) > 1


def test_a_response_stops_at_any_of_its_ends_and_is_padded_from_there(take, network):
    free = [greedy_by_hand(network, prompt, 8, []) for prompt in PROMPTS]
    ends, lengths = [free[0][1], free[1][3]], []
    tokens = drawn(take(network), network, GREEDY, ends=ends).tokens
    for row, prompt in zip(tokens.tolist(), PROMPTS, strict=True):
        alone = greedy_by_hand(network, prompt, 8, ends)
        assert row == alone + [PAD] * (len(row) - len(alone))
        lengths.append(len(alone))
    assert min(lengths) < max(lengths)
    assert tokens.shape[1] == max(lengths)


def test_logprobs_are_zero_after_the_end_and_the_end_has_its_own(take, network):
    engine = take(network)
    torch.manual_seed(0)
    sampling, ends = SamplingParameters(max_new_tokens=12), list(range(18, VOCABULARY))
    prompts = [list(prompt) for prompt in PROMPTS for _ in range(8)]
    generation = drawn(engine, network, sampling, ends=ends, prompts=prompts)
    lengths = []
    for prompt, tokens, logprobs in zip(prompts, generation.tokens.tolist(), generation.logprobs, strict=True):
        length = next((n for n, token in enumerate(tokens, 1) if token in ends), len(tokens))
        assert tokens[length:] == [PAD] * (len(tokens) - length)
        assert logprobs[length:].tolist() == [0.0] * (len(tokens) - length)
        torch.testing.assert_close(logprobs[:length], logprobs_of(network, prompt, tokens[:length]), rtol=0, atol=1e-4)
        lengths.append(length)
    assert len(set(lengths)) > 2


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_are_as_frequent_as_the_softmax_says(take, network, temperature):
    draws, prompt = 3000, PROMPTS[0]
    with torch.no_grad():
        p = torch.softmax(network(input_ids=torch.tensor([prompt])).logits[0, -1] / temperature, -1)
    torch.manual_seed(0)
    sampling = SamplingParameters(max_new_tokens=1, temperature=temperature)
    tokens = drawn(take(network), network, sampling, prompts=[prompt] * draws).tokens
    counts = torch.bincount(tokens[:, 0], minlength=VOCABULARY).float()
    common = p * draws > 10
    expected = torch.cat([p[common] * draws, (p[~common].sum() * draws)[None].clamp(min=1e-9)])
    seen = torch.cat([counts[common], counts[~common].sum()[None]])
    chi_square = float(((seen - expected).square() / expected)[expected > 5].sum())
    cells = int((expected > 5).sum())
    assert cells > 4
    assert chi_square < cells + 4 * (2 * cells) ** 0.5  # mean and spread of its distribution
    assert seen[-1] < expected[-1] + 4 * expected[-1] ** 0.5 + 3


def test_top_k_and_top_p_cut_the_distribution(take, network):
    prompt, engine = PROMPTS[0], take(network)
    with torch.no_grad():
        p = torch.softmax(network(input_ids=torch.tensor([prompt])).logits[0, -1], -1)
    order = p.argsort(descending=True).tolist()
    nucleus = next(n for n in range(1, VOCABULARY) if p[order[:n]].sum() >= 0.6)
    assert 1 < nucleus < 10
    torch.manual_seed(0)
    for settings, kept in [({"top_k": 3}, 3), ({"top_p": 0.6}, nucleus)]:
        generation = drawn(engine, network, SamplingParameters(max_new_tokens=1, **settings), prompts=[prompt] * 400)
        assert set(generation.tokens[:, 0].tolist()) == set(order[:kept])
        assert generation.logprobs is None


def test_the_same_seed_gives_the_same_tokens_and_another_gives_others(take, network):
    engine, sampling = take(network), SamplingParameters(max_new_tokens=16)
    drafts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drafts.append(drawn(engine, network, sampling, prompts=[[4, 5], [6, 7], [4, 5], [8]] * 4).tokens)
    assert torch.equal(drafts[0], drafts[1])
    assert not torch.equal(drafts[0], drafts[2])
    assert not torch.equal(drafts[0][0], drafts[0][2])  # the same prompt, twice in a batch


def test_nothing_but_the_seeds_is_taken_from_the_generator(take, network):
    torch.manual_seed(5)
    engine = take(network)
    drawn(engine, network, SamplingParameters(max_new_tokens=4))
    after = torch.rand(1)
    torch.manual_seed(5)
    torch.randint(2**62, (len(PROMPTS),))
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(5)
    drawn(engine, network, GREEDY)
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(5).get_state())


def test_after_a_rest_it_goes_on_as_before(engine, network, monkeypatch):
    monkeypatch.setattr(engine, "sleep", True)  # there is nothing to give up on a CPU; the calls are the same
    version = next(VERSIONS)
    engine.take_weights(network, None, version)
    expected = drawn(engine, network, GREEDY).tokens
    for _ in range(2):
        engine.rest()
        engine.take_weights(network, None, version)
        assert torch.equal(drawn(engine, network, GREEDY).tokens, expected)
    engine.rest()
    change(network, seed=7)
    engine.take_weights(network, None, next(VERSIONS))
    assert drawn(engine, network, GREEDY).tokens.tolist() == [greedy_by_hand(network, p, 8, []) for p in PROMPTS]


def test_a_response_may_fill_the_context_to_its_end(take, network):
    ids, mask = left_padded([[4] * (LONGEST - 6)])
    sampling = SamplingParameters(max_new_tokens=6)
    tokens = take(network).generate(network, ids, mask, sampling, eos_ids=NEVER, pad_id=PAD).tokens
    assert tokens.shape == (1, 6)
