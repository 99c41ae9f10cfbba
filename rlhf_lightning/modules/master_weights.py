"""Optimizers for weights in half precision: float32 master weights, and the check that a run without them can learn."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from torch.optim import Optimizer

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.precision import HALF
from rlhf_lightning.modules.optimization import OptimizerFactory
from rlhf_lightning.modules.zero import ZeROStrategy

log = logging.getLogger(__name__)

MASTER = "master"  # key of a weight's float32 copy in the optimizer's state
SMALLEST = 1e-4  # learning rate below which an Adam step is lost in the rounding of most bfloat16 weights


class MasterWeights(Optimizer):
    """Any optimizer, with a float32 copy of every weight that is in half precision.

    The optimizer steps on the copies, and the weights are the copies rounded. Without them a step of 1e-6 is smaller than the
    rounding of nearly every bfloat16 weight, and the weights stay where they are. Copies and optimizer state are in
    checkpoints, so that a resumed run equals the uninterrupted one bit for bit. Gradients are added up over micro-batches in
    the precision of the weights. In YAML:

    .. code-block:: yaml

        optimizer:
          class_path: rlhf_lightning.modules.master_weights.MasterWeights
          init_args: {optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-6}}}

    Source: Micikevicius et al. 2018, section 3.1, https://arxiv.org/abs/1710.03740
    """

    def __init__(
        self,
        params: Iterable[Any],
        optimizer: OptimizerFactory = lambda params: torch.optim.AdamW(params, lr=1e-6),
    ) -> None:
        """Copy the weights.

        Args:
            params: Weights, or groups of them.
            optimizer: Makes the optimizer that steps on the copies. Weights that are float32 already are their own copies.
        """
        self.inner: Optimizer | None = None
        super().__init__(params, {})
        self.masters = [master_of(weight) for weight in self._weights()]
        copies = iter(self.masters)
        groups = [{**group, "params": [next(copies) for _ in group["params"]]} for group in self.param_groups]
        self.inner = optimizer(groups)
        if not any(weight.dtype in HALF for weight in self._weights()):
            log.warning("MasterWeights copies nothing: all trained weights are float32 already")
        self._share()

    def _weights(self) -> list[Tensor]:
        return [weight for group in self.param_groups for weight in group["params"]]

    def _share(self) -> None:
        """Take over the inner optimizer's state, and the settings that schedules and checkpoints look for in groups."""
        assert self.inner is not None
        self.state = self.inner.state
        self.defaults = self.inner.defaults
        for own, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            own.update({key: value for key, value in inner.items() if key != "params"})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add weights with settings of their own, as :meth:`torch.optim.Optimizer.add_param_group` does."""
        super().add_param_group(param_group)
        if self.inner is not None:
            masters = [master_of(weight) for weight in self.param_groups[-1]["params"]]
            self.masters += masters
            self.inner.add_param_group({**param_group, "params": masters})
            self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step on the float32 copies, and round them into the weights.

        Args:
            closure: Computes loss and gradients.

        Returns:
            The closure's loss.
        """
        assert self.inner is not None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for own, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({key: value for key, value in own.items() if key != "params"})
        copied = [(w, master) for w, master in zip(self._weights(), self.masters, strict=True) if w is not master]
        for weight, master in copied:
            master.grad = None if weight.grad is None else weight.grad.to(master.dtype)
        self.inner.step()
        for weight, master in copied:
            if master.grad is not None:
                weight.copy_(master)
                master.grad = None
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's, with the copy of each weight as ``master`` in its state."""
        assert self.inner is not None
        state = self.inner.state_dict()
        kept = {index: dict(values) for index, values in state["state"].items()}
        for index, (weight, master) in enumerate(zip(self._weights(), self.masters, strict=True)):
            if weight is not master:
                kept.setdefault(index, {})[MASTER] = master
        return {**state, "state": kept}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up copies and state; from a checkpoint without copies, those of the weights as they are."""
        assert self.inner is not None
        saved = {index: dict(values) for index, values in state_dict["state"].items()}
        for index, (weight, master) in enumerate(zip(self._weights(), self.masters, strict=True)):
            copy = saved.get(index, {}).pop(MASTER, None)
            if weight is not master:
                master.copy_(weight if copy is None else copy)
        self.inner.load_state_dict({**state_dict, "state": {i: values for i, values in saved.items() if values}})
        self._share()


def master_of(weight: Tensor) -> Tensor:
    """A float32 copy of a weight in half precision; the weight itself if it is wider."""
    return weight.detach().float() if weight.dtype in HALF else weight


def build_optimizer(module: Any, params: Iterable[Any]) -> Optimizer:
    """Make a module's optimizer, and make sure that it moves the weights.

    Args:
        module: Has an ``optimizer_factory``.
        params: The trained weights, or groups of them.

    Raises:
        UserError: If weights in half precision would stay where they are, or the strategy can't go with master weights.
    """
    try:
        optimizer = module.optimizer_factory(params)
    except ValueError as error:
        raise UserError(f"model.optimizer: {error}") from error
    strategy = getattr(module._trainer, "strategy", None)
    if isinstance(optimizer, MasterWeights):
        if isinstance(strategy, ZeROStrategy):
            raise UserError("DeepSpeed keeps float32 master weights itself: name the optimizer without MasterWeights")
        if isinstance(strategy, FSDPStrategy):
            raise UserError("MasterWeights can't follow FSDP1's weights; use -c configs/strategy/fsdp2.yaml")
        return optimizer
    if not getattr(optimizer, "bf16_stochastic_round", False):  # torchao's, which rounds up or down by chance
        check_learning_rate(optimizer)
    return optimizer


def check_learning_rate(optimizer: Optimizer) -> None:
    """Make sure that steps are not lost in the rounding of the weights.

    Raises:
        UserError: If weights in half precision are trained at a learning rate below 1e-4; 0 is nobody's mistake.
    """
    for group in optimizer.param_groups:
        rate = float(group["lr"])
        half = [weight.dtype for weight in group["params"] if weight.dtype in HALF]
        if half and 0 < rate < SMALLEST:
            raise UserError(
                f"{str(half[0]).removeprefix('torch.')} weights do not learn at a learning rate of {rate:g}: its steps are "
                "lost in rounding. Train float32 weights (trainer.precision bf16-mixed or 32-true, and dtype float32), or set "
                "model.optimizer.class_path to rlhf_lightning.modules.master_weights.MasterWeights, which keeps float32 copies"
            )
