"""Policy and critic in one module, so that one forward (and one FSDP root) serves a PPO update."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlhf_lightning.models.policy import PolicyNetwork, PolicyOutput, score_tokens
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.trunk import hidden_states


class ActorCriticOutput(NamedTuple):
    """What the policy says of the response tokens, and the critic's value before each of them.

    Attributes:
        logprobs: Shape (batch, length - 1), float32; aligned with ``input_ids[:, 1:]``, zero off the response.
        entropy: Same shape.
        values: Same shape.
    """

    logprobs: Tensor
    entropy: Tensor
    values: Tensor


class ActorCritic(nn.Module):
    """A policy with a critic of its own, or with a value head on its own trunk."""

    def __init__(self, policy: PolicyNetwork, critic: ScalarModel | None) -> None:
        """Args: the policy, and the critic; None for a value head that shares the policy's trunk."""
        super().__init__()
        self.policy = policy
        self.critic = critic
        if critic is None:
            self.value_head = nn.Linear(policy.network.config.get_text_config().hidden_size, 1)
            # From zero, so that the first advantages are plain returns (lm-human-preferences).
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        *,
        temperature: float = 1.0,
        entropy_gradient: bool = False,
    ) -> ActorCriticOutput:
        """Arguments as in :class:`PolicyNetwork`; the value of token t is read where its logits are, at t - 1."""
        hidden = hidden_states(self.policy.network, input_ids, attention_mask)
        scored: PolicyOutput = score_tokens(
            self.policy.network,
            hidden,
            input_ids,
            response_mask,
            temperature=temperature,
            entropy_gradient=entropy_gradient,
        )
        if self.critic is None:
            with torch.autocast(hidden.device.type, enabled=False):
                values = self.value_head(hidden.float()).squeeze(-1)
        else:
            values = self.critic(input_ids, attention_mask, pooled=False)
        return ActorCriticOutput(scored.logprobs, scored.entropy, values[:, :-1].masked_fill(~response_mask[:, 1:], 0))

    def parameter_groups(self, critic_lr: float | None) -> list[dict]:
        """Optimizer groups: the policy, and the critic with a learning rate of its own where one is given."""
        critic = self.value_head if self.critic is None else self.critic
        group: dict = {"params": [p for p in critic.parameters() if p.requires_grad]}
        if critic_lr is not None:
            group["lr"] = critic_lr
        return [{"params": list(self.policy.parameters())}, group]
