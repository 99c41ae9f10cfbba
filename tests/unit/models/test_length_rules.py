"""Rules that begin at a length: each row is what it is alone, whatever its neighbours, or it is refused in one line."""

import copy
import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.attention import knows_rows, rules_of, use_rows
from rlhf_lightning.models.length_rules import LengthRules, length_fields, trunk_of
from rlhf_lightning.models.trunk import hidden_states

LENGTHS = [7, 3, 13, 9, 3]
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Told to the attention function, which packs it.
TOLD = {"mistral": {"sliding_window": 5}, "olmo3": {"sliding_window": 5}}
# In the model's own mask alone.
UNTOLD = {
    "phimoe": {"sliding_window": 5, **EXPERTS},
    "qwen2_moe": {
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "llama4_text": {
        "attention_chunk_size": 5,
        "attn_temperature_tuning": False,
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
    },
}
# The queries of some layers are scaled by a step function of their column.
STEPS = {"attention_chunk_size": 8192, "attn_temperature_tuning": True, "floor_scale": 5, "attn_scale": 1.0}


def build(kind, fields, std=0.3):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **fields})
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=std)
    return model


def batch(side, lengths=LENGTHS):
    width = max(lengths)
    columns, lengths = torch.arange(width), torch.tensor(lengths)[:, None]
    mask = columns < lengths if side == "right" else columns >= width - lengths
    return torch.randint(3, 40, mask.shape, generator=torch.Generator().manual_seed(1)), mask


def alone(model, ids, mask):
    """Each row by itself through transformers' eager attention, and the gradients of a weighted sum over all rows."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    states = [trunk_of(eager)(input_ids=r[k][None]).last_hidden_state[0] for r, k in zip(ids, mask, strict=True)]
    weigh(torch.cat(states)).backward()
    return torch.cat(states).detach(), gradients(eager)


def weigh(hidden):
    return (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))).sum()


def gradients(model):
    return {name: p.grad for name, p in trunk_of(model).named_parameters() if p.grad is not None}


def assert_as_alone(model, ids, mask):
    model.zero_grad()
    expected, wanted = alone(model, ids, mask)
    use_rows(model)
    states = hidden_states(model, ids, mask)
    got = states.hidden[states.at[mask]]
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    weigh(got).backward()
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max()) or 1.0
        torch.testing.assert_close(found[name] / scale, gradient / scale, atol=1e-4, rtol=0)
    return len(states.hidden) == int(mask.sum())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", TOLD)
def test_a_window_that_attention_is_told_of_is_packed(kind, side):
    model = build(kind, TOLD[kind])
    assert assert_as_alone(model, *batch(side))
    assert rules_of(model) == LengthRules()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", UNTOLD)
def test_a_window_or_chunk_in_the_mask_alone_keeps_longer_rows_padded(kind, side, caplog):
    model = build(kind, UNTOLD[kind])
    with caplog.at_level(logging.WARNING):
        assert not assert_as_alone(model, *batch(side))
    assert rules_of(model).packed == 5
    assert not knows_rows(model)
    assert "more than 5 tokens stay padded" in caplog.text


@pytest.mark.parametrize("kind", UNTOLD)
def test_rows_within_the_window_are_packed_all_the_same(kind):
    assert assert_as_alone(build(kind, UNTOLD[kind]), *batch("left", [5, 2, 4, 5]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_bias_in_the_mask_that_begins_at_zero_is_not_lost(side):
    """Doge adds to its scores what it computes from the values, times a weight that begins at zero."""
    model = build("doge", {"sliding_window": None})
    assert not assert_as_alone(model, *batch(side))
    assert rules_of(model).packed == 0
    assert not knows_rows(model, 1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_that_depends_on_the_name_of_the_attention_is_made_for_its_own(side):
    """DeepSeek-V3.2 adds its choice of tokens to the mask in one of two ways, by the implementation's name."""
    sizes = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 6}
    experts = {
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
    model = build("deepseek_v32", {**sizes, **experts, "num_key_value_heads": 4, "index_topk": 6}, std=0.2)
    ids, mask = batch(side)
    expected, _ = alone(model, ids, mask)
    use_rows(model)
    with torch.no_grad():
        states = hidden_states(model, ids, mask)
    torch.testing.assert_close(states.hidden[states.at[mask]], expected, atol=2e-5, rtol=2e-5)


def test_what_reads_a_text_from_both_ends_is_no_causal_model():
    model = build("bert-generation", {"is_decoder": False})
    with pytest.raises(UserError, match="computes a token from what follows it"):
        use_rows(model)


def test_a_window_far_beyond_the_rows_is_found_too():
    """What a probe of a few tokens in the real config cannot see."""
    for kind, name in (("phimoe", "sliding_window"), ("llama4_text", "attention_chunk_size")):
        model = build(kind, {**UNTOLD[kind], name: 4096})
        use_rows(model)
        assert rules_of(model).packed == 4096
        assert knows_rows(model, 4096)
        assert not knows_rows(model, 4097)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_rule_that_counts_columns_counts_those_of_the_row(side):
    """Packed, it would count those of the rows before it too: short rows are affected, if there are enough of them."""
    model = build("llama4_text", UNTOLD["llama4_text"] | STEPS)
    assert not assert_as_alone(model, *batch(side))
    assert not assert_as_alone(model, *batch(side, [3, 4, 2, 4]))
    assert rules_of(model) == LengthRules(packed=0)


def scaling(kind):
    short, long = [1.0] * 4, [4.0, 3.0, 2.0, 1.5]
    if kind == "dynamic":
        return {
            "max_position_embeddings": 8,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        }
    rope = {"rope_type": "longrope", "short_factor": short, "long_factor": long, "rope_theta": 1e4}
    return {"max_position_embeddings": 64, "rope_parameters": rope | {"original_max_position_embeddings": 8}}


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_scaling_that_follows_the_longest_row_is_refused_past_its_bound(kind):
    model = build("llama", scaling(kind))
    ids, mask = batch("left", [9, 3])
    expected, _ = alone(model, ids[1:], mask[1:])
    beside = trunk_of(copy.deepcopy(model))(input_ids=torch.stack([ids[0], ids[1].roll(3)])).last_hidden_state[1, :3]
    assert (
        beside - expected
    ).abs().max() > 0.01  # the longer neighbour changes the shorter row: that is what is refused
    use_rows(model)
    assert rules_of(model) == LengthRules(8, 8)
    with pytest.raises(UserError, match="a row has 9 tokens; beyond 8"):
        hidden_states(model, ids, mask)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_scaling_that_follows_the_longest_row_is_packed_up_to_its_bound(kind, side):
    assert assert_as_alone(build("llama", scaling(kind)), *batch(side, [8, 3, 5]))


def test_padding_on_both_sides_is_not_counted():
    model = build("llama", scaling("longrope"))
    use_rows(model)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, :6] = mask[1, 4:12] = True
    assert len(hidden_states(model, torch.ones(2, 12, dtype=torch.long), mask).hidden) == 14


def test_an_architecture_too_large_to_build_as_it_is_is_made_small(monkeypatch):
    """Full sizes of a model that nobody could build here: its rule is found on a narrow one."""
    from rlhf_lightning.models import length_rules as module

    kind = type(trunk_of(build("phimoe", UNTOLD["phimoe"])))
    config = AutoConfig.for_model("phimoe", sliding_window=2048)
    fields = length_fields(config)
    assert set(fields.values()) == {2048}
    small = module._built(kind, config, list(fields))
    assert small is not None
    assert sum(p.numel() for p in small.parameters()) <= module.LARGEST
    assert small.config.sliding_window == module.SHORT
    monkeypatch.setattr(module, "_built", lambda *_: None)  # and where that fails, each rule is taken to hold
    run = lambda *_: pytest.fail("nothing to run")  # noqa: E731
    assert module._measured(kind, config, fields, run, run, run) == LengthRules(packed=2048)


def test_the_callers_random_numbers_stay_what_they_were():
    model = build("mistral", {"sliding_window": 7})
    state = torch.get_rng_state()
    use_rows(model)
    assert torch.equal(torch.get_rng_state(), state)
