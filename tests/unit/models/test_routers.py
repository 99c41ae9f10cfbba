"""Mixtures of experts: the same routing in train mode as in eval mode, and the auxiliary loss in every method."""

import logging

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.load_balancing import load_balancing_loss
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.routers import take_router_loss
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.spec import ModelSpec

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
NOISY = {
    "mixtral": {**SIZES, **EXPERTS, "router_jitter_noise": 0.5},
    "phimoe": {**SIZES, **EXPERTS, "router_jitter_noise": 0.4, "input_jitter_noise": 0.5, "attention_dropout": 0.2},
    "opt": {  # no experts, but whole layers are dropped
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "layerdrop": 0.5,
        "dropout": 0.3,
    },
    "dbrx": {
        "d_model": 16,
        "n_heads": 2,
        "n_layers": 2,
        "resid_pdrop": 0.3,
        "attn_config": {"attn_pdrop": 0.3, "kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.5},
    },
}


def spec(kind, **fields):
    coefficient = fields.pop("coefficient", None)
    return ModelSpec(architecture={"model_type": kind, **NOISY[kind], **fields}, router_aux_loss_coef=coefficient)


def policy(tokenizer, kind="mixtral", **fields):
    torch.manual_seed(0)
    network = load_causal_lm(spec(kind, **fields), tokenizer)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.35)
    return PolicyNetwork(network)


@pytest.mark.parametrize("kind", NOISY)
def test_routing_has_no_noise_and_no_layer_is_dropped_in_train_mode(kind, tokenizer, batch):
    model = policy(tokenizer, kind)
    found = []
    with torch.no_grad():
        for mode in (False, True, True):
            found.append(model.train(mode)(*batch).logprobs)
    assert torch.equal(found[1], found[2])
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=0)


def test_the_loss_is_that_of_transformers_and_of_a_loop():
    torch.manual_seed(0)
    layers = tuple(torch.randn(7, 5) for _ in range(3))
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1])
    for chosen in (None, mask):
        expected = load_balancing_loss_func(layers, 5, 2, chosen)
        own = None if chosen is None else chosen.bool()
        torch.testing.assert_close(load_balancing_loss(layers, 2, own), expected)
        sent, given, count = [0] * 5, [0.0] * 5, 0
        for layer in layers:
            for row in layer if own is None else layer[own]:
                count += 1
                for expert in row.argsort()[-2:].tolist():
                    sent[expert] += 1
                given = [a + float(b) for a, b in zip(given, row.softmax(0), strict=True)]
        looped = 5 * sum(s / count * g / count for s, g in zip(sent, given, strict=True))
        assert float(expected) == pytest.approx(looped, rel=1e-5)


@pytest.mark.parametrize("attention", [None, "eager"])  # packed, and padded
@pytest.mark.parametrize("kind", ["mixtral", "phimoe", "dbrx"])
def test_a_training_forward_keeps_the_loss_of_its_real_tokens(kind, attention, tokenizer, batch):
    coefficient = 0.3
    model = policy(tokenizer, kind, coefficient=coefficient)
    if attention is not None:
        model.network.set_attn_implementation(attention)
    ids, mask, _ = batch
    model(*batch)
    got = take_router_loss(model)
    rows = [model.network(input_ids=r[k][None], output_router_logits=True) for r, k in zip(ids, mask, strict=True)]
    layers = [torch.cat([row.router_logits[i].reshape(-1, 4) for row in rows]) for i in range(2)]
    torch.testing.assert_close(got, coefficient * load_balancing_loss(layers, 2))
    got.backward()
    routers = [p for name, p in model.named_parameters() if "gate.weight" in name or "router" in name]
    assert routers
    assert all(p.grad.abs().sum() > 0 for p in routers)
    assert take_router_loss(model) is None  # taken


def test_it_is_the_configs_coefficient_unless_the_user_has_another(tokenizer, batch):
    losses = []
    for fields in ({"router_aux_loss_coef": 0.02}, {"router_aux_loss_coef": 0.02, "coefficient": 0.2}):
        model = policy(tokenizer, **fields)
        model(*batch)
        losses.append(take_router_loss(model).item())
    assert losses[1] == pytest.approx(10 * losses[0])


def test_without_gradient_or_in_eval_mode_nothing_is_kept(tokenizer, batch):
    model = policy(tokenizer)
    with torch.no_grad():
        model(*batch)
    model.eval()(*batch)
    assert take_router_loss(model) is None


def test_a_reward_model_keeps_it_too(tokenizer, batch):
    model = ScalarModel(load_scalar_model(spec("mixtral"), tokenizer, new_head=True))
    model(*batch[:2])
    assert take_router_loss(model) > 0


def test_checkpointed_activations_give_the_same_gradient(tokenizer, batch):
    gradients = []
    for again in (False, True):
        model = policy(tokenizer)
        if again:
            model.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = model(*batch).logprobs.sum()
        (loss + take_router_loss(model)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_its_absence_is_said(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        policy(tokenizer, coefficient=0.0)
    assert "without an auxiliary loss for its routers (router_aux_loss_coef is 0)" in caplog.text


def test_a_coefficient_without_routers_is_refused(tokenizer):
    with pytest.raises(UserError, match="has no routers"):
        policy(tokenizer, "opt", coefficient=0.1)
