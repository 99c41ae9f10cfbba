"""Adapters: what is trained, what the base gives without them, and what a checkpoint holds of them."""

import gc

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.adapters import DEFAULT, active, adapter_weights
from rlhf_lightning.models.frozen import Frozen, policy_as_it_starts
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.spec import LoRA, ModelSpec
from rlhf_lightning.modules import DPOModule, PPOModule
from rlhf_lightning.rewards.world import GoldReward
from rlhf_lightning.worlds import HHHWorld
from tests.unit.models.adapted import LORA, bytes_beside, change, exported, learnt, parameters_alive

LINEARS = {  # shapes of the linear layers of one block, in and out
    "llama": [(16, 16), (16, 8), (16, 8), (16, 16), (16, 32), (16, 32), (32, 16)],
    "gpt2": [(16, 48), (16, 16), (16, 64), (64, 16)],
}


# ---------------------------------------------------------------- what is trained


def test_the_matrices_are_trained_and_nothing_else(adapted, tokenizer, architecture, base):
    network = load_causal_lm(adapted, tokenizer)
    assert type(network) is type(load_causal_lm(ModelSpec(path=base), tokenizer))
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert all("lora_A" in name or "lora_B" in name for name in trained)
    layers = 2 * LINEARS[architecture["model_type"]]
    assert sum(p.numel() for p in trained.values()) == sum(LORA.rank * (i + o) for i, o in layers)
    assert not any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in network.modules())


@pytest.mark.parametrize("adapter", [LoRA(rank=4, alpha=8, use_rslora=True), LoRA(rank=4, alpha=8)], ids=str)
def test_the_scale_is_that_of_the_paper(base, tokenizer, batch, adapter):
    network = learnt(load_causal_lm(ModelSpec(path=base, adapter=adapter), tokenizer))
    layer = next(m for m in network.modules() if hasattr(m, "lora_A"))
    down, up = layer.lora_A[DEFAULT].weight, layer.lora_B[DEFAULT].weight
    x = torch.randn(5, down.shape[1])
    with active(network, []):
        before = layer(x)
    scale = 8 / (2 if adapter.use_rslora else 4)
    torch.testing.assert_close(layer(x) - before, scale * (x @ down.T @ up.T), rtol=1e-4, atol=1e-5)


def test_half_precision_weights_carry_an_adapter_in_float32(base, tokenizer):
    network = load_causal_lm(ModelSpec(path=base, dtype="bfloat16", adapter=LORA), tokenizer)
    assert {(p.requires_grad, p.dtype) for p in network.parameters()} == {
        (True, torch.float32),
        (False, torch.bfloat16),
    }


def test_targets_can_be_named(base, tokenizer, architecture):
    target = {"llama": "q_proj", "gpt2": "c_attn"}[architecture["model_type"]]
    network = load_causal_lm(ModelSpec(path=base, adapter=LoRA(rank=2, target_modules=[target])), tokenizer)
    assert len(adapter_weights(network, DEFAULT)) == 2 * 2  # A and B in two layers
    assert all(target in name for name in adapter_weights(network, DEFAULT))


def test_recomputed_activations_give_the_same_gradients(base, tokenizer, batch):
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        network = learnt(load_causal_lm(ModelSpec(path=base, adapter=LORA, gradient_checkpointing=again), tokenizer))
        PolicyNetwork(network)(*batch).logprobs.sum().backward()
        gradients.append([p.grad for p in network.parameters() if p.requires_grad])
    for expected, found in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------- the reference


def test_the_reference_is_the_base_bit_for_bit(adapted, base, tokenizer, batch):
    policy = PolicyNetwork(load_causal_lm(adapted, tokenizer))
    reference = policy_as_it_starts(policy, adapted, tokenizer, policy)
    learnt(policy)
    plain = Frozen(PolicyNetwork(load_causal_lm(ModelSpec(path=base), tokenizer)))
    for temperature in (1.0, 0.7):
        found = reference(*batch, temperature=temperature)
        assert not found.logprobs.requires_grad
        assert torch.equal(found.logprobs, plain(*batch, temperature=temperature).logprobs)
    assert (policy(*batch).logprobs - found.logprobs).abs().max() > 0.1  # the adapter is on again


def test_references_are_told_apart_by_their_base_and_not_by_what_is_trained(adapted, base, tokenizer):
    """Numbers of a reference are kept on disk under what it says of itself."""

    def said():
        policy = PolicyNetwork(load_causal_lm(adapted, tokenizer))
        reference = policy_as_it_starts(policy, adapted, tokenizer, policy)
        learnt(policy, seed=torch.seed())
        return {name: tensor.tolist() for name, tensor in reference.state().items()}

    first = said()
    assert first == said()
    change(base)
    assert first != said()


def test_the_adapter_is_on_again_after_an_exception(adapted, tokenizer, batch):
    policy = PolicyNetwork(load_causal_lm(adapted, tokenizer))
    reference = policy_as_it_starts(policy, adapted, tokenizer, policy)
    learnt(policy)
    before = policy(*batch).logprobs
    with pytest.raises(TypeError):
        reference(*batch, nonsense=1)
    assert torch.equal(policy(*batch).logprobs, before)


def test_gradients_are_as_if_the_reference_had_never_been_asked(adapted, tokenizer, batch):
    gradients = []
    for asked in (False, True):
        torch.manual_seed(0)
        policy = PolicyNetwork(load_causal_lm(adapted, tokenizer))
        reference = policy_as_it_starts(policy, adapted, tokenizer, policy)
        learnt(policy)
        output = policy(*batch).logprobs.sum()
        if asked:
            reference(*batch)  # between forward and backward, as in DPO
        output.backward()
        gradients.append([p.grad for p in policy.parameters() if p.requires_grad])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_no_second_set_of_weights_exists(base, tokenizer, architecture):
    adapter = sum(LORA.rank * (i + o) for i, o in 2 * LINEARS[architecture["model_type"]]) * 4
    weights = sum(w.numel() for w in AutoModelForCausalLM.from_pretrained(base).parameters()) * 4
    for lora, expected in ((None, 2 * weights), (LORA, weights + adapter)):
        before = parameters_alive()
        own = ModelSpec(path=base, adapter=lora)
        policy = PolicyNetwork(load_causal_lm(own, tokenizer))
        reference = policy_as_it_starts(policy, own, tokenizer, policy)
        assert bytes_beside(before) == expected
        del policy, reference


@pytest.mark.parametrize("method", ["dpo", "ppo"])
def test_no_module_keeps_a_second_set(base, architecture, method):
    before, spec = parameters_alive(), ModelSpec(path=base, adapter=LORA)
    module = DPOModule(spec) if method == "dpo" else PPOModule(spec, spec, GoldReward(HHHWorld()))
    module.configure_model()  # with the tokenizer of the folder
    adapter = sum(LORA.rank * (i + o) for i, o in 2 * LINEARS[architecture["model_type"]])
    weights = sum(w.numel() for w in AutoModelForCausalLM.from_pretrained(base).parameters())
    expected = weights + adapter if method == "dpo" else weights + 2 * adapter + 16  # and the critic's head
    gc.collect()
    assert bytes_beside(before) == 4 * expected


def test_a_policy_that_goes_on_from_an_adapter_is_compared_with_that(adapted, base, tokenizer, batch, tmp_path):
    first = PolicyNetwork(learnt(load_causal_lm(adapted, tokenizer)))
    start = first(*batch).logprobs.detach()
    folder = exported(first, tokenizer, tmp_path / "export") / "adapter"

    own = ModelSpec(path=base, adapter=LoRA(path=str(folder)))
    policy = PolicyNetwork(load_causal_lm(own, tokenizer))
    torch.testing.assert_close(policy(*batch).logprobs.detach(), start)
    reference = policy_as_it_starts(policy, own, tokenizer, policy)
    learnt(policy, seed=2)
    torch.testing.assert_close(reference(*batch).logprobs, start)
    assert (policy(*batch).logprobs - start).abs().max() > 0.1
    assert not any("reference" in name for name in policy.state_dict())


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_that_lacks_a_trained_weight_is_refused(adapted, tokenizer):
    policy = PolicyNetwork(load_causal_lm(adapted, tokenizer))
    state = dict(policy.state_dict())
    missing = next(name for name in state if "lora_B" in name)
    del state[missing]
    with pytest.raises(RuntimeError, match=missing.replace(".", r"\.")):
        policy.load_state_dict(state)


def test_a_checkpoint_of_another_base_is_refused(adapted, base, tokenizer):
    state = PolicyNetwork(load_causal_lm(adapted, tokenizer)).state_dict()
    change(base)
    with pytest.raises(UserError, match="trained on other weights"):
        PolicyNetwork(load_causal_lm(adapted, tokenizer)).load_state_dict(state)
