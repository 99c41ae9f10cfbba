"""Policy and critic in one module, so that one forward (and one FSDP root) serves a PPO update."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_lightning.models.policy import PolicyNetwork, score_tokens
from rlhf_lightning.models.precision import at_least_float32
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.shared_critic import SharedCritic
from rlhf_lightning.models.trunk import States, hidden_states


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
        values_only: bool = False,
    ) -> ActorCriticOutput:
        """Score and value the tokens that ``response_mask`` marks; the value of token t is read where its logits are, at t - 1.

        Args:
            input_ids: As in :class:`PolicyNetwork`, like the next four.
            attention_mask: Same.
            response_mask: Same.
            temperature: Same.
            entropy_gradient: Same.
            values_only: What the policy says is known already: leave it out, as zeros.
        """
        states: States | None = None
        if self.critic is None or not values_only:
            states = hidden_states(self.policy.network, input_ids, attention_mask)
        values = self._values(states, input_ids, attention_mask)[:, :-1].masked_fill(~response_mask[:, 1:], 0)
        if values_only or states is None:
            return ActorCriticOutput(torch.zeros_like(values), torch.zeros_like(values), values)
        scored = score_tokens(
            self.policy.network,
            states,
            input_ids,
            response_mask,
            temperature=temperature,
            entropy_gradient=entropy_gradient,
        )
        return ActorCriticOutput(scored.logprobs, scored.entropy, values)

    def _values(self, states: States | None, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self.critic is not None:
            return self.critic(input_ids, attention_mask, pooled=False)
        assert states is not None
        with torch.autocast(states.hidden.device.type, enabled=False):
            # In float32 at least: bfloat16 values of neighbouring tokens tie.
            head, hidden = self.value_head, at_least_float32(states.hidden)
            values = F.linear(hidden, at_least_float32(head.weight), at_least_float32(head.bias))
            return values.squeeze(-1)[states.at]

    def parameter_groups(self, critic_lr: float | None) -> list[dict]:
        """Optimizer groups: the policy, and the critic with a learning rate of its own where one is given."""
        critic = self.value_head if self.critic is None else self.critic
        own = critic.own_parameters() if isinstance(critic, SharedCritic) else list(critic.parameters())
        group: dict = {"params": [p for p in own if p.requires_grad]}
        if critic_lr is not None:
            group["lr"] = critic_lr
        of_critic = {id(p) for p in own}  # which may stand in the policy's own layers
        return [{"params": [p for p in self.policy.parameters() if p.requires_grad and id(p) not in of_critic]}, group]
