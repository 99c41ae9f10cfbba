"""A critic that is an adapter and a head on the policy's frozen base: in memory there is one base."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rlhf_lightning.models.adapter_files import HEAD
from rlhf_lightning.models.adapters import CRITIC, active, adapter_weights, checkpoint_only, put_in, take_normalisation
from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.models.merging import unquantized
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.spec import ModelSpec


class SharedCritic(ScalarModel):
    """Computes with the critic's adapter in place of the policy's."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As :class:`ScalarModel`."""
        with active(self.network, [CRITIC]):
            return super().forward(*args, **kwargs)

    def own_parameters(self) -> list[nn.Parameter]:
        """Adapter and head: what is trained with the critic's learning rate."""
        return [*adapter_weights(self.network, CRITIC).values(), *self.network.get_submodule(HEAD).parameters()]


def load_critic(
    spec: ModelSpec, policy_spec: ModelSpec, policy: PolicyNetwork, tokenizer: PreTrainedTokenizerBase
) -> ScalarModel:
    """A critic with weights of its own, or, where both are adapters on the same base, one on the policy's.

    Args:
        spec: Of the critic. An adapter with a ``path`` comes with its head, that of a trained reward model; a new one has
            a head of zeros, so that the first advantages are plain returns.
        policy_spec: Of the policy.
        policy: The policy.
        tokenizer: Of both.
    """
    if not spec.shares_base_with(policy_spec):
        return ScalarModel(load_scalar_model(spec, tokenizer))
    config = unquantized(policy.network)
    config.num_labels = 1
    with torch.device("meta"):
        network: Any = AutoModelForSequenceClassification.from_config(config)
    setattr(network, network.base_model_prefix, policy.network.base_model)
    network.peft_config = policy.network.peft_config
    old = network.get_submodule(HEAD)
    assert isinstance(old, nn.Linear)
    head = nn.Linear(old.in_features, 1, bias=old.bias is not None)
    nn.init.zeros_(head.weight)
    network.add_module(HEAD, head)
    take_normalisation(network.config, put_in(policy.network, CRITIC, spec, head))
    checkpoint_only(network, lambda name, _: name.startswith(f"{HEAD}."))  # the rest is in the policy's
    return SharedCritic(network)
