"""A network that is only looked at."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.models.adapters import BASE, REFERENCE, active, adapter_weights, put_in
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.merging import whole
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.sharding import gathered, whole_state_dict
from rlhf_lightning.models.spec import ModelSpec


class Frozen:
    """Holds a network outside the module tree: not trained, not wrapped by DDP, not written into checkpoints.

    Calls run without gradient. The weights stay bit for bit what they were.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    @property
    def own_network(self) -> nn.Module | None:
        """The weights that are held for this alone, and that FSDP2 is to shard."""
        return self.network

    def to(self, device: torch.device | str) -> "Frozen":
        """Move the network."""
        self.network.to(device)
        return self

    def state(self) -> dict[str, Tensor]:
        """What its numbers follow from, whole, on the CPU of the first rank; every rank must call."""
        return whole_state_dict(self.network)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's forward."""
        forward: Callable[..., Any] = self.network
        return forward(*args, **kwargs)


class AdapterOff(Frozen):
    """A policy as it was before its adapter was trained: the same weights, without the adapter, in memory once.

    A policy that began with a trained adapter is compared with that: a copy of its matrices stays, not of its base.
    """

    def __init__(self, policy: PolicyNetwork, spec: ModelSpec, root: nn.Module) -> None:
        """Take the policy as it is now.

        Args:
            policy: In training, with an adapter.
            spec: What it was made from.
            root: What FSDP2 shards with the policy in it, or the policy itself.
        """
        self.network, self.root = policy, root
        if spec.adapter is not None and spec.adapter.path is not None:
            put_in(policy.network, REFERENCE, spec)
        self.adapters = [REFERENCE] if adapter_weights(policy.network, REFERENCE) else []

    @property
    def own_network(self) -> None:
        """None: the policy's weights are its own affair."""

    def to(self, device: torch.device | str) -> "AdapterOff":
        """Nothing: it is where the policy is."""
        return self

    def state(self) -> dict[str, Tensor]:
        """Which base it is, and the adapter that it is compared with."""
        network: Any = self.network
        kept = {name: whole(weight) for name, weight in adapter_weights(network, REFERENCE).items()}
        return {BASE: network.network.get_buffer(BASE)} | kept

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The policy's forward, with the adapter off."""
        policy: Any = self.network
        with active(policy.network, self.adapters):
            if self.root is policy:
                return policy(*args, **kwargs)
            with gathered(self.root):  # below a root its hooks don't gather
                return policy(*args, **kwargs)


def policy_as_it_starts(
    policy: PolicyNetwork, spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, root: nn.Module
) -> Frozen:
    """The reference that a policy is held against: with an adapter the policy itself without it, else a second copy.

    Args:
        policy: As it starts.
        spec: What it was made from.
        tokenizer: Its tokenizer.
        root: What FSDP2 is to shard with the policy in it, or the policy itself.
    """
    if spec.adapter is not None:
        return AdapterOff(policy, spec, root)
    reference = PolicyNetwork(load_causal_lm(spec, tokenizer))
    reference.load_state_dict(policy.state_dict())  # one from scratch would have other random weights
    return Frozen(reference)
