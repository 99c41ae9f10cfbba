"""What the native engine says of its tokens, and what it costs: counted, without a clock."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.logprobs import entropy, log_softmax
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.generation.native import NativeEngine
from rlhf_lightning.generation.sampling import drawn, filtered
from rlhf_lightning.models.attention import use_rows
from rlhf_lightning.models.length_rules import LengthRules

PAD, EOS, VOCABULARY = 0, 2, 12


def llama(**changed):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    for name, value in changed.items():
        setattr(config, name, value)
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.35, generator=generator)
    use_rows(model)
    return model


def left_padded(prompts):
    width = max(map(len, prompts))
    lengths = torch.tensor([len(p) for p in prompts])
    return torch.tensor([[PAD] * (width - len(p)) + p for p in prompts]), torch.arange(width) >= (width - lengths)[
        :, None
    ]


def lengths_of(tokens):
    return [row.index(EOS) + 1 if EOS in row else len(row) for row in tokens.tolist()]


PROMPTS = [[4, 5, 6, 7], [8, 9], [10, 3, 3], [8, 9], [4, 5, 6, 7], [8, 9], [11]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_are_those_of_a_forward_over_the_row_alone(temperature):
    torch.manual_seed(0)
    network, sampling = llama(), SamplingParameters(max_new_tokens=20, temperature=temperature)
    drawn = NativeEngine().generate(network, *left_padded(PROMPTS * 3), sampling, eos_ids=[EOS], pad_id=PAD)
    lengths = lengths_of(drawn.tokens)
    assert min(lengths) < 5 < max(lengths) <= drawn.tokens.shape[1]
    for row, (prompt, length) in enumerate(zip(PROMPTS * 3, lengths, strict=True)):
        response = drawn.tokens[row, :length].tolist()
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        known = log_softmax(logits, temperature)
        torch.testing.assert_close(
            drawn.logprobs[row, :length], known.gather(1, torch.tensor(response)[:, None])[:, 0], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(drawn.entropy[row, :length], entropy(known), atol=1e-5, rtol=1e-5)
        assert not drawn.tokens[row, length:].any()
        assert not drawn.logprobs[row, length:].any()
        assert not drawn.entropy[row, length:].any()


def test_a_prompt_is_read_once_and_a_row_that_has_ended_costs_nothing():
    torch.manual_seed(1)
    engine = NativeEngine()
    drawn = engine.generate(
        llama(), *left_padded(PROMPTS * 9), SamplingParameters(max_new_tokens=40), eos_ids=[EOS], pad_id=PAD
    )
    tokens = sum(lengths_of(drawn.tokens))
    assert (engine.work.prompts, engine.work.prefills, engine.work.tokens) == (63, 4, tokens)
    # The first token of a row comes of the prefill, every other one of one step of that row.
    assert engine.work.row_steps == tokens - 63
    assert drawn.tokens.numel() > 2 * tokens  # else the rows were of one length, and this has shown nothing


def test_samples_of_one_prompt_differ():
    torch.manual_seed(2)
    drawn = NativeEngine().generate(
        llama(), *left_padded([[4, 5]] * 30), SamplingParameters(max_new_tokens=8), eos_ids=[EOS], pad_id=PAD
    )
    assert len({tuple(row) for row in drawn.tokens.tolist()}) > 20


def test_a_sliding_window_slides_over_the_stored_keys_too():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=3,
    )
    network = MistralForCausalLM(config).eval()
    network.model.embed_tokens.weight.data.normal_()
    before = network.config._attn_implementation
    use_rows(network)
    assert (before, network.config._attn_implementation) == ("sdpa", "rlhf_rows")
    sampling = SamplingParameters(max_new_tokens=9)
    drawn = NativeEngine().generate(
        network, *left_padded([[4, 5, 6, 7, 8], [8, 9]]), sampling, eos_ids=[99], pad_id=PAD
    )
    network.set_attn_implementation("eager")
    for row, prompt in enumerate([[4, 5, 6, 7, 8], [8, 9]]):
        ids = torch.tensor([prompt + drawn.tokens[row].tolist()])
        with torch.no_grad():
            logits = network(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        expected = log_softmax(logits, 1.0).gather(1, drawn.tokens[row][:, None])[:, 0]
        torch.testing.assert_close(drawn.logprobs[row], expected, atol=1e-5, rtol=1e-5)


MLA = {
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("deepseek_v2", MLA | {"q_lora_rank": None}),
        ("deepseek_v3", MLA | {"q_lora_rank": 8}),
        (
            "diffllama",
            {"num_key_value_heads": 2, "head_dim": 8},
        ),  # calls its attention twice a layer, with other values
    ],
)
def test_each_buffer_has_the_size_of_what_goes_into_it(kind, fields):
    """Value heads are smaller than key heads in multi-head latent attention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = AutoConfig.for_model(kind, num_attention_heads=2, **sizes, **fields)
    network = AutoModelForCausalLM.from_config(config).eval()
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.35)
    use_rows(network)
    sampling = SamplingParameters(max_new_tokens=7)
    drawn = NativeEngine().generate(network, *left_padded(PROMPTS), sampling, eos_ids=[EOS], pad_id=PAD)
    network.set_attn_implementation("eager")
    for row, (prompt, length) in enumerate(zip(PROMPTS, lengths_of(drawn.tokens), strict=True)):
        ids = torch.tensor([prompt + drawn.tokens[row, :length].tolist()])
        with torch.no_grad():
            logits = network(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        expected = log_softmax(logits, 1.0).gather(1, drawn.tokens[row, :length, None])[:, 0]
        torch.testing.assert_close(drawn.logprobs[row, :length], expected, atol=1e-5, rtol=1e-5)


def test_a_row_that_would_outgrow_what_is_computed_rightly_is_refused():
    network = llama()
    network.length_rules = LengthRules(packed=8)
    sampling = SamplingParameters(max_new_tokens=4)
    NativeEngine().generate(network, *left_padded([[4] * 4]), sampling, eos_ids=[EOS], pad_id=PAD)
    with pytest.raises(UserError, match="natively beyond 8 tokens"):
        NativeEngine().generate(network, *left_padded([[4] * 5]), sampling, eos_ids=[EOS], pad_id=PAD)


def test_an_architecture_that_it_cannot_serve_is_refused_with_the_way_out():
    network = llama()
    network.set_attn_implementation("eager")
    with pytest.raises(UserError, match="TransformersEngine"):
        NativeEngine().generate(network, *left_padded([[4]]), SamplingParameters(), eos_ids=[EOS], pad_id=PAD)


def test_drawing_follows_the_weights_and_never_takes_what_has_none():
    torch.manual_seed(0)
    weights = torch.tensor([0.0, 0.5, 0.0, 1.5, 0.0, 2.0, 0.0])
    counts = torch.bincount(drawn(weights.expand(40_000, -1)), minlength=7)
    assert not counts[[0, 2, 4, 6]].any()
    torch.testing.assert_close(counts / 40_000, weights / 4, atol=0.01, rtol=0)


def test_the_greatest_random_number_stays_on_the_last_token_that_has_weight(monkeypatch):
    monkeypatch.setattr(torch, "rand_like", torch.ones_like)  # rounding could make it 1
    assert drawn(torch.tensor([[0.3, 0.3, 0.4, 0.0, 0.0]])).tolist() == [2]


def test_top_k_then_top_p():
    probabilities = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    kept = filtered(probabilities, SamplingParameters(top_k=3, top_p=0.75))  # of .9 that top-k leaves, .675 are wanted
    torch.testing.assert_close(kept, torch.tensor([[0.4, 0.3, 0.0, 0.0]]))


def test_top_k_keeps_exactly_k_tokens_also_where_some_are_equally_likely():
    probabilities = torch.tensor([[0.2, 0.2, 0.2, 0.2, 0.2], [0.1, 0.3, 0.3, 0.15, 0.15], [0.5, 0.2, 0.15, 0.1, 0.05]])
    for k in (1, 2, 3, 5, 9):
        weights = filtered(probabilities, SamplingParameters(top_k=k))
        assert (weights > 0).sum(1).tolist() == [min(k, 5)] * 3
        kept = weights > 0
        for row, keep in zip(probabilities, kept, strict=True):
            assert row[keep].min() >= row.masked_fill(keep, 0).max()
            assert torch.equal(weights[kept], probabilities[kept])
