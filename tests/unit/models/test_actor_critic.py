"""Policy and critic in one module: where values are read, what is trained, and a frozen network that is not."""

import pytest
import torch
from torch import nn

from rlhf_lightning.models.actor_critic import ActorCritic
from rlhf_lightning.models.frozen import Frozen
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.scalar_head import ScalarModel


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_value_of_a_token_is_read_before_it(causal, scalar, rows, side):
    critic = ScalarModel(scalar)
    critic.normalise(mean=2.0, std=0.5)
    ids, attention, response = rows.laid_out(side, 2)
    output = ActorCritic(PolicyNetwork(causal), critic)(ids, attention, response)
    expected = []
    for row, prompt in zip(rows.tokens, rows.prompts, strict=True):
        hidden = scalar.base_model(input_ids=torch.tensor([row])).last_hidden_state
        expected.append(2 * scalar.score(hidden)[0, prompt - 1 : -1, 0] - 4)
    torch.testing.assert_close(output.values[response[:, 1:]], torch.cat(expected), rtol=1e-5, atol=1e-5)
    assert output.values[~response[:, 1:]].eq(0).all()
    policy = PolicyNetwork(causal)(ids, attention, response)
    assert torch.equal(output.logprobs, policy.logprobs)
    assert torch.equal(output.entropy, policy.entropy)


def test_a_head_on_the_policys_trunk_starts_at_zero_and_can_learn(causal, rows):
    model = ActorCritic(PolicyNetwork(causal), None)
    ids, attention, response = rows.laid_out("right")
    assert model(ids, attention, response).values.eq(0).all()
    hidden = causal.base_model(input_ids=torch.tensor([rows.tokens[3]])).last_hidden_state
    alone = [x[3:] for x in (ids, attention, response)]
    model(*alone).values.sum().backward()
    torch.testing.assert_close(model.value_head.weight.grad[0], hidden[0, 1], rtol=1e-4, atol=1e-5)
    assert model.value_head.bias.grad.item() == 1


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_temperature_reaches_the_policy_and_not_the_values(causal, scalar, rows, temperature):
    batch = rows.laid_out("right")
    model = ActorCritic(PolicyNetwork(causal), ScalarModel(scalar))
    output = model(*batch, temperature=temperature)
    assert torch.equal(output.logprobs, PolicyNetwork(causal)(*batch, temperature=temperature).logprobs)
    assert torch.equal(output.values, model(*batch).values)


@pytest.mark.parametrize("shared", [True, False])
def test_every_parameter_is_in_exactly_one_optimizer_group(causal, scalar, shared):
    model = ActorCritic(PolicyNetwork(causal), None if shared else ScalarModel(scalar))
    groups = model.parameter_groups(critic_lr=0.5)
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters()}
    assert "lr" not in groups[0]
    assert groups[1]["lr"] == 0.5
    critic = model.value_head if shared else model.critic
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in critic.parameters()}
    assert all("lr" not in group for group in model.parameter_groups(critic_lr=None))


def test_a_frozen_network_is_not_part_of_its_owner(causal, rows):
    frozen = Frozen(PolicyNetwork(causal).train())

    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.reference = frozen
            self.own = nn.Linear(1, 1)

    owner = Owner().train()
    assert set(owner.state_dict()) == {"own.weight", "own.bias"}
    assert len(list(owner.parameters())) == 2
    assert not frozen.network.training
    output = frozen(*rows.laid_out("right"), entropy_gradient=True)
    assert not output.logprobs.requires_grad
    assert not output.entropy.requires_grad
    assert all(not p.requires_grad for p in causal.parameters())


def test_the_same_weights_as_reference_give_a_kl_of_exactly_zero(causal, rows):
    batch = rows.laid_out("left")
    policy = PolicyNetwork(causal)
    current = policy(*batch).logprobs.detach()
    assert torch.equal(current, Frozen(policy)(*batch).logprobs)
