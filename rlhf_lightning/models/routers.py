"""Mixtures of experts: routing without noise, and the auxiliary loss that keeps all experts in use."""

import logging
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.load_balancing import load_balancing_loss
from rlhf_lightning.models.length_rules import trunk_of

log = logging.getLogger(__name__)

COEFFICIENT = "router_aux_loss_coef"  # in configs, and of a network that is trained with one
LOSSES = "router_losses"  # of a network: those of the forwards since they were last taken
EXPERTS = re.compile(r"(moe_)?num_(local_|routed_)?experts|n_routed_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k", "top_k_experts")


def set_up_routers(network: PreTrainedModel, coefficient: float | None) -> None:
    """Turn noise in routing off, as dropout is, and set the coefficient of the auxiliary loss; log where there is none.

    Noise would make old and new log-probabilities differ at equal weights.

    Args:
        network: As loaded.
        coefficient: Of the auxiliary loss; None for that of the network's config.

    Raises:
        UserError: If a coefficient is given for a network without a loss that it could multiply.
    """
    for module in network.modules():
        if any("jitter" in name for name in vars(module)):
            module.register_forward_pre_hook(_in_eval_mode)
    fields = _fields(network)
    experts = max(
        (value for name, value in fields.items() if EXPERTS.fullmatch(name) and type(value) is int), default=1
    )
    records = "router_logits" in (getattr(trunk_of(network), "_can_record_outputs", None) or {})
    balanced = experts > 1 and records and any(fields.get(name) for name in CHOSEN)
    if coefficient and not balanced:
        raise UserError(f"{COEFFICIENT}: {type(network).__name__} has no routers whose logits it gives; leave it out")
    chosen = fields.get(COEFFICIENT) if coefficient is None else coefficient
    if balanced and chosen:
        setattr(network, COEFFICIENT, float(chosen))
        setattr(network, LOSSES, [])
    elif experts > 1:
        log.warning(
            "%s is a mixture of experts and is trained without an auxiliary loss for its routers (%s)",
            type(network).__name__,
            f"{COEFFICIENT} is 0" if balanced else f"it gives no router logits, or its config has no {COEFFICIENT}",
        )


def _in_eval_mode(module: nn.Module, _: Any) -> None:
    """Before each forward, for ``train()`` of a network reaches all that is in it."""
    module.training = False


def _fields(network: PreTrainedModel) -> dict[str, Any]:
    """Fields of the text config and of its nested configs, such as those of DBRX."""
    fields = network.config.get_text_config().to_dict()
    nested = [value for name, value in fields.items() if name.endswith("_config") and isinstance(value, dict)]
    return {key: value for part in nested for key, value in part.items()} | fields


def router_arguments(network: PreTrainedModel) -> dict[str, bool]:
    """What a forward of the trunk takes where an auxiliary loss is wanted of it: in training alone."""
    wanted = hasattr(network, LOSSES) and network.training and torch.is_grad_enabled()
    return {"output_router_logits": True} if wanted else {}


def keep_router_loss(network: PreTrainedModel, output: Any, mask: Tensor | None = None) -> None:
    """Keep the auxiliary loss of a forward until :func:`take_router_loss`.

    Args:
        network: Whose trunk was called with :func:`router_arguments`.
        output: What it gave.
        mask: True on real tokens; None where all are. Shape (tokens,), bool.
    """
    if router_arguments(network):
        layers = [layer.reshape(-1, layer.shape[-1]) for layer in output.router_logits if layer is not None]
        fields = _fields(network)
        top_k = next(fields[name] for name in CHOSEN if fields.get(name))
        losses: list[Tensor] = getattr(network, LOSSES)
        losses.append(load_balancing_loss(layers, top_k, mask))


def take_router_loss(module: nn.Module) -> Tensor | None:
    """The auxiliary losses of all networks in a module, times their coefficients, since the last call; None without any.

    Of several forwards of one network it is the mean.
    """
    total: Tensor | None = None
    for network in module.modules():
        if losses := getattr(network, LOSSES, None):
            loss = getattr(network, COEFFICIENT) * torch.stack(losses).mean()
            total = loss if total is None else total + loss
            losses.clear()
    return total
