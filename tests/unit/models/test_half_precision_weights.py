"""Casting a network to half precision leaves rotary frequencies and a reward model's scale as they were."""

import pytest
import torch

from rlhf_lightning.models.actor_critic import ActorCritic
from rlhf_lightning.models.ensemble import ScalarEnsemble
from rlhf_lightning.models.frozen import Frozen
from rlhf_lightning.models.head import head_scores
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.precision import cast
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.spec import ModelSpec, as_wide_as
from tests.invariance.subjects import tokenizer
from tests.precision.methods import TINY

WAYS = {
    "to": lambda network: network.to(torch.bfloat16),
    "bfloat16": lambda network: network.bfloat16(),
    "half": lambda network: network.half(),
    "cpu": lambda network: network.to("cpu", torch.bfloat16),
}
NETWORKS = {
    "policy": lambda: PolicyNetwork(load_causal_lm(ModelSpec(architecture=TINY), tokenizer())),
    "scalar": lambda: ScalarModel(load_scalar_model(ModelSpec(architecture=TINY), tokenizer(), new_head=True)),
    "ensemble": lambda: ScalarEnsemble([NETWORKS["scalar"](), NETWORKS["scalar"]()]),
    "actor-critic": lambda: ActorCritic(NETWORKS["policy"](), NETWORKS["scalar"]()),
    "frozen": lambda: Frozen(NETWORKS["policy"]()).network,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_float32_buffers_survive_a_cast(kind, way):
    network = NETWORKS[kind]()
    for model in network.modules():
        if isinstance(model, ScalarModel):
            model.normalise(0.123456789, 3.1415926)
            model.calibrate(torch.tensor(0.7654321))
    before = {name: buffer.clone() for name, buffer in network.named_buffers() if buffer.is_floating_point()}
    assert any(name.endswith("rotary_emb.inv_freq") for name in before)
    WAYS[way](network)
    after = dict(network.named_buffers())
    for name, buffer in before.items():
        assert after[name].dtype == torch.float32, name
        assert torch.equal(after[name], buffer), name
    assert not any(weight.dtype == torch.float32 for weight in network.parameters())


def test_a_wider_cast_widens_buffers_too():
    network = NETWORKS["policy"]().double()
    assert {buffer.dtype for buffer in network.buffers()} == {torch.float64}


def test_a_network_from_scratch_in_bfloat16_has_exact_frequencies():
    exact, half = (load_causal_lm(ModelSpec(architecture=TINY, dtype=d), tokenizer()) for d in ("float32", "bfloat16"))
    assert torch.equal(exact.model.rotary_emb.inv_freq, half.model.rotary_emb.inv_freq)
    cast(exact, torch.bfloat16)
    assert torch.equal(exact.model.rotary_emb.inv_freq, half.model.rotary_emb.inv_freq)
    assert exact.dtype == half.dtype == torch.bfloat16


def test_a_position_of_a_thousand_turns_by_the_right_angle():
    """With frequencies in bfloat16 it is off by .4 rad."""
    rotary = NETWORKS["policy"]().to(torch.bfloat16).network.model.rotary_emb
    positions = torch.tensor([[1000]])
    cos, sin = rotary(torch.zeros(1, 1, 1), positions)
    angle = torch.atan2(sin.float(), cos.float())[0, 0, :4]
    expected = 1000 * 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    apart = (angle.double() - expected + torch.pi) % (2 * torch.pi) - torch.pi
    assert apart.abs().max() < 2e-3


def test_scores_of_a_bfloat16_reward_model_keep_their_scale():
    model = NETWORKS["scalar"]()
    model.normalise(5.0, 0.3)
    ids = torch.tensor([[4, 5, 6, 7]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    model.to(torch.bfloat16)
    raw = model(ids, mask, normalised=False)
    assert raw.dtype == torch.float32
    torch.testing.assert_close(model(ids, mask), raw / 0.3 - 5.0 / 0.3, rtol=1e-6, atol=1e-5)


def test_a_shared_critic_in_bfloat16_gives_float32_values():
    network = ActorCritic(NETWORKS["policy"](), None).to(torch.bfloat16)
    torch.nn.init.normal_(network.value_head.weight)
    ids = torch.tensor([[4, 5, 6, 7]])
    response = torch.tensor([[False, False, True, True]])
    output = network(ids, torch.ones_like(response), response)
    assert output.values.dtype == torch.float32
    assert (output.values != output.values.bfloat16()).any()  # computed in float32, not rounded


@pytest.mark.parametrize(
    ("policy", "reference", "expected"),
    [
        ("bfloat16", "float32", "bfloat16"),
        ("bfloat16", None, "bfloat16"),
        ("float32", "bfloat16", "bfloat16"),
        ("float32", "float32", "float32"),
        ("float16", "float32", "float16"),
    ],
)
def test_a_reference_is_read_in_the_half_precision_of_its_policy(policy, reference, expected):
    spec = None if reference is None else ModelSpec(path="other", dtype=reference)
    assert as_wide_as(ModelSpec(path="x", dtype=policy), spec).dtype == expected


def test_the_heads_gradient_is_added_up_in_float32_over_chunks(monkeypatch):
    """A bfloat16 sum of many chunks loses what each adds."""
    generator = torch.Generator().manual_seed(0)
    network = load_causal_lm(ModelSpec(architecture=TINY), tokenizer())
    network.get_output_embeddings().weight.data.normal_(std=0.3, generator=generator)
    network.to(torch.bfloat16)
    hidden = torch.randn(2048, 32, generator=generator).bfloat16()
    tokens = torch.randint(12, (2048,), generator=generator)

    def gradient(rows):
        monkeypatch.setattr("rlhf_lightning.models.head.ROWS", {"cpu": rows, "cuda": rows})
        weight = network.get_output_embeddings().weight
        weight.grad = None
        head_scores(network, hidden, tokens).logprobs.sum().backward()
        return weight.grad.float()

    whole, chunks = gradient(2048), gradient(4)
    torch.testing.assert_close(chunks, whole, rtol=0.02, atol=0.01 * float(whole.abs().max()))
