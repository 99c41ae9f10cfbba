"""Generation: greedy against an argmax loop, sampling against the softmax, and what must not change either."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.generation.native import NativeEngine
from rlhf_lightning.generation.transformers_engine import TransformersEngine
from rlhf_lightning.models.attention import use_rows

PAD, VOCABULARY = 0, 12
NEVER = [VOCABULARY]  # an end that is never drawn
PROMPTS = ([4, 5, 6, 7], [8, 9], [10, 3, 3])


@pytest.fixture(params=["llama", "gpt2"])
def network(request):
    if request.param == "llama":
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        )
        model = LlamaForCausalLM(config)
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.35, generator=generator)
    use_rows(model.eval())
    return model


@pytest.fixture(params=[NativeEngine, TransformersEngine])
def engine(request):
    return request.param()


def left_padded(extra=0, garbage=PAD):
    width = max(map(len, PROMPTS)) + extra
    ids = torch.tensor([[garbage] * (width - len(p)) + p for p in PROMPTS])
    lengths = torch.tensor([len(p) for p in PROMPTS])
    return ids, torch.arange(width) >= (width - lengths)[:, None]


def greedy_by_hand(network, prompt, steps, ends):
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(network(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


def generate(engine, network, sampling, ends=(), **layout):
    return engine.generate(network, *left_padded(**layout), sampling, eos_ids=list(ends), pad_id=PAD).tokens


GREEDY = SamplingParameters(max_new_tokens=8, temperature=0.0)


@pytest.mark.parametrize("layout", [{}, {"extra": 3}, {"extra": 3, "garbage": 11}])
def test_greedy_is_the_argmax_loop_whatever_the_padding(engine, network, layout):
    tokens = generate(engine, network, GREEDY, ends=NEVER, **layout)
    expected = [greedy_by_hand(network, prompt, 8, []) for prompt in PROMPTS]
    assert tokens.tolist() == expected
    assert len({tuple(row) for row in expected}) > 1


def test_a_response_stops_at_any_of_its_ends_and_is_padded_from_there(engine, network):
    free = [greedy_by_hand(network, prompt, 8, []) for prompt in PROMPTS]
    ends = [free[0][1], free[1][3]]
    tokens = generate(engine, network, GREEDY, ends=ends)
    lengths = []
    for row, prompt in zip(tokens.tolist(), PROMPTS, strict=True):
        alone = greedy_by_hand(network, prompt, 8, ends)
        assert row == alone + [PAD] * (len(row) - len(alone))
        lengths.append(len(alone))
    assert min(lengths) < 8
    assert tokens.shape[1] == max(lengths)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_are_as_frequent_as_the_softmax_says(engine, network, temperature):
    draws, prompt = 6000, torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        p = torch.softmax(network(input_ids=prompt).logits[0, -1] / temperature, -1)
    torch.manual_seed(0)
    ids = prompt.expand(draws, -1)
    sampling = SamplingParameters(max_new_tokens=1, temperature=temperature)
    tokens = engine.generate(network, ids, torch.ones_like(ids).bool(), sampling, eos_ids=[2], pad_id=PAD).tokens
    share = torch.bincount(tokens[:, 0], minlength=VOCABULARY) / draws
    common = p > 0.005  # at least thirty draws are expected: rarer ones are not normally distributed
    assert ((share - p).abs() / (p * (1 - p) / draws).sqrt())[common].max() < 3.5  # the worst of a dozen
    assert share[~common].sum() < p[~common].sum() + 0.005
    assert common.sum() > 5  # top-k or top-p of a few tokens would show


def test_top_k_and_top_p_cut_the_distribution(engine, network):
    prompt = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        p = torch.softmax(network(input_ids=prompt).logits[0, -1], -1)
    order = p.argsort(descending=True).tolist()
    nucleus = next(n for n in range(1, VOCABULARY) if p[order[:n]].sum() >= 0.6)
    ids = prompt.expand(500, -1)
    torch.manual_seed(0)
    for sampling, kept in [
        (SamplingParameters(max_new_tokens=1, top_k=3), 3),
        (SamplingParameters(max_new_tokens=1, top_p=0.6), nucleus),
    ]:
        tokens = engine.generate(network, ids, torch.ones_like(ids).bool(), sampling, eos_ids=[2], pad_id=PAD).tokens
        assert set(tokens[:, 0].tolist()) == set(order[:kept])


def test_the_generation_config_of_the_folder_is_kept_and_changes_nothing(engine, network):
    expected = generate(engine, network, GREEDY, ends=NEVER)
    torch.manual_seed(1)
    sampled = generate(engine, network, SamplingParameters(max_new_tokens=8), ends=NEVER)
    own = GenerationConfig(
        do_sample=True,
        top_k=1,
        top_p=0.1,
        temperature=0.01,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        bad_words_ids=[[int(expected[0, 0])]],
        suppress_tokens=[int(expected[1, 0])],
        min_new_tokens=3,
        max_length=5,
        eos_token_id=[int(expected[2, 0])],
    )
    network.generation_config = own
    before = copy.deepcopy(own.to_dict())
    assert torch.equal(generate(engine, network, GREEDY, ends=NEVER), expected)
    torch.manual_seed(1)
    assert torch.equal(generate(engine, network, SamplingParameters(max_new_tokens=8), ends=NEVER), sampled)
    assert network.generation_config is own
    assert own.to_dict() == before


def test_the_generation_config_comes_back_after_an_error_too(network):
    own = network.generation_config
    with pytest.raises(RuntimeError):
        TransformersEngine().generate(
            network, torch.tensor([[1]]), torch.ones(2, 5).bool(), GREEDY, eos_ids=[2], pad_id=PAD
        )
    assert network.generation_config is own


@pytest.mark.parametrize(
    "fields", [{"max_new_tokens": 0}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}]
)
def test_sampling_parameters_out_of_range_are_refused(fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        SamplingParameters(**fields)


def test_only_untruncated_sampling_draws_from_the_policy_itself():
    assert SamplingParameters().samples_the_policy
    assert SamplingParameters(temperature=0.7).samples_the_policy
    for other in ({"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 5}):
        assert not SamplingParameters(**other).samples_the_policy


@pytest.mark.slow
@pytest.mark.parametrize("network", ["llama"], indirect=True)
def test_continuous_batching_answers_alike_and_leaves_the_network_as_it_was(network):
    before = network.config._attn_implementation
    expected = [greedy_by_hand(network, prompt, 8, []) for prompt in PROMPTS]
    ends = [expected[0][1], expected[1][3]]
    plain, continuous = (
        generate(TransformersEngine(continuous_batching=on), network, GREEDY, ends=ends) for on in (False, True)
    )
    assert torch.equal(plain, continuous)
    only_the_likeliest = SamplingParameters(max_new_tokens=8, min_p=1.0)
    assert torch.equal(
        generate(TransformersEngine(continuous_batching=True), network, only_the_likeliest, ends=ends), plain
    )
    assert network.config._attn_implementation == before


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_what_an_engine_drew_with_is_what_a_forward_gives(engine, network, temperature):
    """Teacher forcing, row by row; zero after the end of a response."""
    torch.manual_seed(1)
    ends = [5, 9]
    sampling = SamplingParameters(max_new_tokens=8, temperature=temperature)
    ids, mask = (x.repeat(4, 1) for x in left_padded(extra=2))
    drawn = engine.generate(network, ids, mask, sampling, eos_ids=ends, pad_id=PAD)
    assert drawn.logprobs.shape == drawn.tokens.shape
    assert drawn.logprobs.dtype == torch.float32
    lengths = set()
    for row, tokens in enumerate(drawn.tokens.tolist()):
        prompt = ids[row][mask[row]].tolist()
        length = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([prompt + tokens[:length]])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits / temperature, -1).gather(-1, torch.tensor(tokens[:length])[:, None])[:, 0]
        torch.testing.assert_close(drawn.logprobs[row, :length], expected, rtol=1e-4, atol=1e-4)
        assert (drawn.logprobs[row, length:] == 0).all()
        lengths.add(length)
    assert len(lengths) > 2


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParameters(4, top_k=3), SamplingParameters(4, top_p=0.5)])
def test_what_is_not_the_policys_distribution_has_no_log_probabilities(engine, network, sampling):
    ids, mask = left_padded()
    assert engine.generate(network, ids, mask, sampling, eos_ids=NEVER, pad_id=PAD).logprobs is None


def test_continuous_batching_hands_its_log_probabilities_on(network, monkeypatch):
    """With a stand-in: the real one takes most of a machine's memory for its cache."""
    asked = []

    def generate_batch(prompts, continuous_batching_config, **settings):
        asked.append(continuous_batching_config.return_logprobs)
        answers = {"r_10": ([9], [-0.5]), "r_2": ([6, 9], [-1.0, -2.0]), "r_3": ([7], [-3.0])}
        return {
            name: SimpleNamespace(error=None, generated_tokens=tokens, logprobs=logprobs if asked[-1] else [])
            for name, (tokens, logprobs) in answers.items()
        }

    monkeypatch.setattr(network, "generate_batch", generate_batch)
    engine, (ids, mask) = TransformersEngine(continuous_batching=True), left_padded()
    drawn = engine.generate(network, ids, mask, SamplingParameters(max_new_tokens=2), eos_ids=[9], pad_id=PAD)
    assert drawn.tokens.tolist() == [[6, 9], [7, PAD], [9, PAD]]
    assert drawn.logprobs.tolist() == [[-1.0, -2.0], [-3.0, 0.0], [-0.5, 0.0]]
    assert engine.generate(network, ids, mask, GREEDY, eos_ids=[9], pad_id=PAD).logprobs is None
    assert asked == [True, False]
