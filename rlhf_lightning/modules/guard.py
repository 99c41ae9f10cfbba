"""No optimizer step is taken on a loss or gradient that is not finite; what led to it is kept for a post-mortem."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.routers import take_router_loss

SHOWN = 3  # parameters named in the message; the file names all
FAR, LONG = 100, 10  # times the clip, steps in a row: what is clipped so much sets no step length any more

log = logging.getLogger(__name__)


def with_router_loss(module: LightningModule, loss: Tensor, share: float = 1.0) -> Tensor:
    """Add the auxiliary loss of mixtures of experts; any other network leaves the loss as it is.

    Args:
        module: Its networks were called for this loss.
        loss: Scalar, what is about to be differentiated.
        share: Of the optimizer step on this rank, where gradients of micro-batches are summed and not averaged.
    """
    auxiliary = take_router_loss(module)
    return loss if auxiliary is None else loss + share * auxiliary


class StepGuard:
    """Remembers the batches of an optimizer step until its gradients have been found finite."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.losses: list[Tensor] = []
        self.far = 0
        self.warned = False

    def saw(self, batch: Any, loss: Tensor) -> Tensor:
        """Keep a batch and its loss until the step.

        Args:
            batch: Typed.
            loss: Scalar, what is about to be differentiated.

        Returns:
            The loss as it came.
        """
        self.batches.append(batch)
        self.losses.append(loss.detach().float())
        return loss

    def check(self, module: LightningModule, norm: Tensor) -> None:
        """Stop before the step if loss or gradients are NaN or infinite, on all ranks alike.

        Args:
            module: The one in training, with the gradients of the whole step.
            norm: Their Euclidean norm, the same on every rank. Scalar.

        Raises:
            UserError: If so; names the file with the batches of the step. Weights and optimizer are as before it.
        """
        trainer = module.trainer
        loss = torch.stack([x.to(norm.device) for x in self.losses]).sum()
        # In float16 the gradient scaler skips a step whose gradients overflow, and tries a smaller scale: no fault.
        scaled = trainer.precision == "16-mixed"
        bad = (~torch.isfinite(loss if scaled else norm + loss)).float()
        if trainer.world_size > 1:
            bad = trainer.strategy.reduce(bad, reduce_op="sum")
        if not bad.item():
            self.batches.clear()
            self.losses.clear()
            return
        names = [name for name, parameter in module.named_parameters() if not finite_gradient(parameter)]
        path = self._write(module, float(loss), float(norm), names)
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        where = f"; gradients not finite: {', '.join(names[:SHOWN])}{more}" if names else ""
        raise UserError(
            f"loss {float(loss):g} and gradient norm {float(norm):g} at optimizer step {trainer.global_step}{where}; the step "
            f"was not taken, weights and checkpoints are as before it; its batches: torch.load('{path}', weights_only=True)"
        )

    def watch(self, norm: Tensor, clip: float | None, step: int) -> None:
        """Log a warning, once, when the gradient norm has stayed far above the clip for several steps.

        Args:
            norm: Euclidean norm of the gradients before clipping, the same on every rank. Scalar.
            clip: The norm that they are clipped to; None or 0 where they are not.
            step: Of the optimizer, for the message.
        """
        if not clip or self.warned:
            return
        self.far = self.far + 1 if float(norm) > FAR * clip else 0
        if self.far == LONG:
            self.warned = True
            warn_of_divergence(float(norm), clip, step)

    def _write(self, module: LightningModule, loss: float, norm: float, names: list[str]) -> Path:
        trainer = module.trainer
        rank = f"_rank{trainer.global_rank}" if trainer.global_rank else ""
        path = Path(trainer.default_root_dir, "postmortem", f"step_{trainer.global_step}{rank}.pt")
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        found = {
            "module": type(module).__name__,
            "step": trainer.global_step,
            "batches": [plain_data(batch) for batch in self.batches],
            "losses": [float(x) for x in self.losses],
            "loss": loss,
            "grad_norm": norm,
            "not_finite": names,
            "metrics": metrics,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, path)
        return path


@rank_zero_only
def warn_of_divergence(norm: float, clip: float, step: int) -> None:
    """Log that gradients are clipped so much that the run may diverge."""
    log.warning(
        "the gradient norm has been more than %d times the clip for %d optimizer steps (%.3g at step %d, clipped to %g): the "
        "run diverges, or its loss is of another scale than the clip; lower the learning rate, or raise the clip if the loss "
        "falls",
        FAR,
        LONG,
        norm,
        step,
        clip,
    )


def finite_gradient(parameter: Tensor) -> bool:
    """Whether the gradient, or this rank's shard of it, holds numbers alone; True where there is none."""
    gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
    return gradient is None or bool(torch.isfinite(gradient).all())


def plain_data(value: Any) -> Any:
    """Tensors on the CPU, lists, dictionaries, text and numbers: what loads with ``weights_only=True``."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if dataclasses.is_dataclass(value):
        return {field.name: plain_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): plain_data(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(part) for part in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)
