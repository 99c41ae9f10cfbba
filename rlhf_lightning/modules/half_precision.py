"""Which precisions a module accepts, and what Lightning's plugins must leave in float32."""

import logging
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, FSDPPrecision, HalfPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import MixedPrecision

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.frozen import Frozen
from rlhf_lightning.models.precision import HALF, cast, weight_dtypes
from rlhf_lightning.modules.zero import ZeROStrategy

log = logging.getLogger(__name__)

ACCEPTED = ("32-true", "bf16-mixed", "bf16-true")


def prepare_precision(module: Any) -> None:
    """Check the Trainer's precision, and keep batches, rewards and metrics in float32; first thing in ``configure_model``.

    Lightning's half precision casts the floating-point numbers of a batch (reference log-probabilities, margins, weights) and
    makes half precision torch's default, so that a reward function's ``torch.tensor`` would be rounded too. Here weights and
    activations are in half precision, and nothing else is.

    Args:
        module: In ``configure_model``; without a trainer nothing happens.

    Raises:
        UserError: If the precision is none that the methods are right in.
    """
    trainer = module._trainer
    if trainer is None:
        return
    precision, plugin, strategy = str(trainer.precision), trainer.precision_plugin, trainer.strategy
    if precision not in (*ACCEPTED, "16-mixed"):  # which methods that step their optimizer themselves refuse
        raise UserError(f"trainer.precision {precision} is not supported; use one of {', '.join(ACCEPTED)}")
    if isinstance(plugin, HalfPrecision | FSDPPrecision | DeepSpeedPrecision):
        plugin.convert_input = lambda data: data  # type: ignore[method-assign]
    if precision == "bf16-true":
        plugin.forward_context = nullcontext
        torch.set_default_dtype(torch.float32)  # until the context around configure_model puts it back
    if isinstance(strategy, FSDPStrategy) and strategy.mixed_precision is None:
        strategy.mixed_precision = MixedPrecision()  # it would cast rotary frequencies; autocast does what is needed


def place_reference(module: Any, reference: Frozen | None) -> None:
    """Bring a reference to the module's device and to the precision in which its policy computes."""
    if reference is None:
        return
    network, strategy = reference.own_network, getattr(module._trainer, "strategy", None)
    if network is not None and strategy is not None:
        strategy.precision_plugin.convert_module(network)
        if isinstance(strategy, ZeROStrategy) and precision_of(module) == "bf16-mixed":
            cast(network, torch.bfloat16)  # as DeepSpeed does with the policy
    # In configure_model the module itself is still where it was built.
    reference.to(module.device if strategy is None else strategy.root_device)


def warn_of_rounded_reference(module: Any) -> None:
    """Log that policy and reference differ by rounding, where the reference was asked for in half precision and the policy not.

    Args:
        module: With both specs, in ``configure_model``.
    """
    policy, reference = module.policy_spec.dtype, module.reference_spec.dtype
    if reference != policy and not precision_of(module).endswith("16-true"):
        log.warning(
            "the reference's weights are %s, the policy's %s: log-probabilities differ by rounding from the first step on",
            reference,
            policy,
        )


def computes_in_half(module: Any, network: nn.Module) -> bool:
    """Whether log-probabilities of a network are rounded to half precision somewhere, by its weights or by autocast.

    Args:
        module: In a Trainer.
        network: Its policy.
    """
    half_weights = bool(weight_dtypes(network) & set(HALF))
    return half_weights or precision_of(module).startswith(("bf16", "16"))


def precision_of(module: Any) -> str:
    """The Trainer's, as Lightning calls it; that of a module by itself is 32-true."""
    return str(getattr(module._trainer, "precision", "32-true"))
