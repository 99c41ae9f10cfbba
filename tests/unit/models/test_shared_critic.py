"""A critic on the policy's base: the numbers and gradients of two networks, the memory of one."""

import pytest
import torch

from rlhf_lightning.models.actor_critic import ActorCritic
from rlhf_lightning.models.adapters import CRITIC, DEFAULT, adapter_weights
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.frozen import policy_as_it_starts
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.shared_critic import SharedCritic, load_critic
from rlhf_lightning.models.spec import LoRA, ModelSpec
from tests.unit.models.adapted import LORA, bytes_beside, learnt, parameters_alive


def pair(spec, critic_spec, tokenizer):
    policy = PolicyNetwork(load_causal_lm(spec, tokenizer))
    return ActorCritic(policy, load_critic(critic_spec, spec, policy, tokenizer))


def test_a_shared_critic_is_the_reward_model_that_it_came_from(adapted, base, tokenizer, batch, reward_adapter):
    folder, model = reward_adapter
    before = parameters_alive()
    both = pair(adapted, ModelSpec(path=base, adapter=LoRA(path=str(folder))), tokenizer)
    policy, critic = both.policy, both.critic
    assert isinstance(critic, SharedCritic)
    weights = {p.data_ptr(): p.numel() * 4 for p in [*policy.parameters(), *critic.parameters()]}
    assert bytes_beside(before) == sum(weights.values())  # one trunk, two adapters, a head
    for weight in adapter_weights(policy.network, DEFAULT).values():
        weight.data.normal_()  # the policy's adapter is nothing to the critic
    for pooled in (True, False):
        found, expected = (m(*batch[:2], pooled=pooled) for m in (critic, model))
        torch.testing.assert_close(found, expected)
        assert found.std() > 0.05


def test_gradients_reach_only_their_own_adapter_and_are_those_of_two_networks(
    adapted, base, tokenizer, batch, reward_adapter
):
    folder, _ = reward_adapter
    both = pair(adapted, ModelSpec(path=base, adapter=LoRA(path=str(folder))), tokenizer)
    learnt_policy = adapter_weights(both.policy.network, DEFAULT)
    torch.manual_seed(5)
    for weight in learnt_policy.values():
        weight.data.normal_(std=0.2)
    alone = PolicyNetwork(load_causal_lm(adapted, tokenizer))
    for name, weight in adapter_weights(alone.network, DEFAULT).items():
        weight.data.copy_(learnt_policy[name])
    critic_alone = ScalarModel(load_scalar_model(ModelSpec(path=base, adapter=LoRA(path=str(folder))), tokenizer))

    weights = torch.randn(batch[0].shape[0], batch[0].shape[1] - 1)
    marked = batch[2][:, 1:]
    output = both(*batch)
    alone_output, alone_values = alone(*batch), critic_alone(*batch[:2], pooled=False)[:, :-1].masked_fill(~marked, 0)
    torch.testing.assert_close(output.logprobs, alone_output.logprobs)
    torch.testing.assert_close(output.values, alone_values)

    def gradients(loss):
        both.zero_grad()
        loss.backward(retain_graph=True)
        return {name: p.grad for name, p in both.named_parameters() if p.grad is not None}

    of_policy, of_critic = gradients((output.logprobs * weights).sum()), gradients((output.values * weights).sum())
    assert {name.split(".")[-2] for name in of_policy} == {"default"}
    assert {name.split(".")[-2] for name in of_critic} == {"critic", "score"}
    (alone_output.logprobs * weights).sum().backward()
    (alone_values * weights).sum().backward()
    for adapter, found, expected in ((DEFAULT, of_policy, alone.network), (CRITIC, of_critic, critic_alone.network)):
        for name, weight in adapter_weights(expected, DEFAULT).items():
            key = f"policy.network.{name}".replace(".weight", f".{adapter}.weight")
            torch.testing.assert_close(found[key], weight.grad, msg=key)


def test_a_gradient_of_the_critic_is_what_a_small_step_says(adapted, base, tokenizer, batch):
    both = pair(adapted, ModelSpec(path=base, adapter=LoRA(rank=2)), tokenizer).double()
    learnt(both)
    weight = next(iter(adapter_weights(both.policy.network, CRITIC).values()))

    def total():
        with torch.autocast("cpu", enabled=False):
            return both.critic(*batch[:2], pooled=False)[batch[1]].square().sum()

    total().backward()
    step = 1e-4
    with torch.no_grad():
        weight[0, 0] += step
        above = total()
        weight[0, 0] -= 2 * step
        below = total()
    # The head computes in float32.
    assert float(weight.grad[0, 0]) == pytest.approx(float((above - below) / (2 * step)), rel=2e-2, abs=1e-3)


def test_recomputing_knows_whose_forward_it_repeats(base, tokenizer, batch):
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        own = ModelSpec(path=base, adapter=LORA, gradient_checkpointing=again)
        both = learnt(pair(own, ModelSpec(path=base, adapter=LORA, gradient_checkpointing=again), tokenizer))
        output = both(*batch)
        (output.logprobs.sum() + output.values.square().sum()).backward()
        gradients.append({name: p.grad for name, p in both.named_parameters() if p.requires_grad})
    assert {name.split(".")[-2] for name in gradients[0]} == {"default", "critic", "score"}
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


def test_a_new_shared_critic_starts_from_zero(adapted, base, tokenizer, batch):
    both = pair(adapted, ModelSpec(path=base, adapter=LoRA(rank=2)), tokenizer)
    assert both(*batch).values.eq(0).all()


def test_the_optimizer_has_each_adapter_in_its_group(adapted, base, tokenizer):
    both = pair(adapted, ModelSpec(path=base, adapter=LoRA(rank=2)), tokenizer)
    policy, critic = both.parameter_groups(0.5)
    names = {id(p): name for name, p in both.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in policy["params"]} == {"default"}
    assert {names[id(p)].split(".")[-2] for p in critic["params"]} == {"critic", "score"}
    trained = [p for p in both.parameters() if p.requires_grad]
    assert sorted(map(id, policy["params"] + critic["params"])) == sorted(map(id, trained))
    assert ("lr" in policy, critic["lr"]) == (False, 0.5)


def test_switching_changes_no_requires_grad(adapted, base, tokenizer, batch):
    both = pair(adapted, ModelSpec(path=base, adapter=LoRA(rank=2)), tokenizer)
    reference = policy_as_it_starts(both.policy, adapted, tokenizer, both)
    before = {name: p.requires_grad for name, p in both.named_parameters()}
    seen = []

    def look(*_):
        seen.append({name: p.requires_grad for name, p in both.named_parameters()})

    both.policy.network.base_model.register_forward_hook(look)
    both(*batch)
    reference(*batch)
    assert len(seen) == 3
    assert all(flags == before for flags in seen)


def test_a_critic_on_another_base_has_weights_of_its_own(adapted, scalar, tokenizer, tmp_path):
    other = str(export_folder(scalar, tokenizer, tmp_path / "other"))
    both = pair(adapted, ModelSpec(path=other, adapter=LoRA(rank=2)), tokenizer)
    assert type(both.critic) is ScalarModel
    assert not {id(p) for p in both.critic.parameters()} & {id(p) for p in both.policy.parameters()}
    policy, critic = both.parameter_groups(None)
    assert all(p.requires_grad for p in policy["params"] + critic["params"])


def test_a_checkpoint_holds_what_is_trained_and_restores_it(adapted, base, tokenizer, batch):
    critic_spec = ModelSpec(path=base, adapter=LoRA(rank=2))
    both = learnt(pair(adapted, critic_spec, tokenizer))
    state = {name: tensor.clone() for name, tensor in both.state_dict().items()}
    trained = {name for name, p in both.named_parameters() if p.requires_grad}
    assert state.keys() == trained | {
        "policy.network.base_sha256",
        "critic.gain",
        "critic.bias",
        "critic.temperature",
    }

    other = learnt(pair(adapted, critic_spec, tokenizer), seed=9)
    assert not torch.equal(other(*batch).logprobs, both(*batch).logprobs)
    other.load_state_dict(state)
    for found, expected in zip(other(*batch), both(*batch), strict=True):
        assert torch.equal(found, expected)
