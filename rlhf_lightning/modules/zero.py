"""DeepSpeed's ZeRO, stages 1 and 2, with our checkpoints: optimizer state, and gradients, in shards over the ranks."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, StrategyRegistry
from torch import Tensor
from torch.optim import Optimizer

from rlhf_lightning.errors import UserError


class ZeROStrategy(DeepSpeedStrategy):
    """Lightning's strategy, which also runs on CPUs over gloo, and whose checkpoints are files like all others here.

    For modules whose optimizer Lightning steps: SFT, reward models, DPO.
    """

    def __init__(self, stage: Literal[1, 2] = 2) -> None:
        """Set the stage.

        Args:
            stage: 1: each rank keeps its share of the optimizer state. 2: of the gradients as well.

        Raises:
            UserError: If DeepSpeed is not installed.
        """
        if find_spec("deepspeed") is None:
            raise UserError("the zero strategy needs DeepSpeed: pip install 'rlhf_lightning[deepspeed]'")
        super().__init__(stage=stage, logging_batch_size_per_gpu=1)  # of no consequence; else a loader is made to look

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def setup(self, trainer: Trainer) -> None:
        """Build the engine.

        Raises:
            UserError: For what DeepSpeed would do otherwise than everyone else, or not at all.
        """
        module = trainer.lightning_module
        if not module.automatic_optimization:
            raise UserError(
                f"{type(module).__name__} steps its own optimizer and clips its own gradients, which ZeRO keeps to itself; use "
                "-c configs/strategy/fsdp2.yaml"
            )
        if trainer.accumulate_grad_batches > 1:
            raise UserError(
                "ZeRO counts batches of its own; set trainer.accumulate_grad_batches to 1, or use fsdp2.yaml"
            )
        if str(trainer.precision) not in ("32-true", "bf16-mixed"):
            raise UserError(f"ZeRO's checkpoints here know precision 32-true and bf16-mixed, not {trainer.precision}")
        super().setup(trainer)

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        """As Lightning's, which tells DeepSpeed the number of a GPU; a CPU has none."""
        import deepspeed

        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine, zero, _, _ = deepspeed.initialize(
            config=self.config,
            model=model,
            model_parameters=trained,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, zero

    def gradient_norm(self) -> Tensor:
        """Euclidean norm of all gradients, before clipping; each rank has a share of them, and all must call. Scalar."""
        return self.optimizers[0].scaled_global_norm()  # type: ignore[attr-defined]

    # ---------------------------------------------------------------- checkpoints
    # DeepSpeed's own are folders of pickles, written in place.

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The shares of all ranks, on the first; every rank must call."""
        zero: Any = self.optimizers[0]
        own = {"optimizer": zero.optimizer.state_dict(), "weights": list(zero.single_partition_of_fp32_groups)}
        shares: list[Any] | None = [None] * self.world_size if self.is_global_zero else None
        dist.gather_object(on_cpu(own), shares)
        return {"stage": zero.partition_gradients + 1, "shares": shares or []}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        DDPStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each rank takes its share.

        Raises:
            UserError: If it was not ZeRO that wrote, or there were more or fewer ranks.
        """
        shares = checkpoint["optimizer_states"][0].get("shares")
        if shares is None or len(shares) != self.world_size:
            there = "another strategy" if shares is None else f"ZeRO on {len(shares)} ranks"
            raise UserError(
                f"the checkpoint's optimizer state is of {there}, this run is of ZeRO on {self.world_size}: it goes on only as "
                "it began; set trainer.strategy and trainer.devices as they were"
            )
        zero: Any = self.optimizers[0]
        own = shares[self.global_rank]
        zero.optimizer.load_state_dict(own["optimizer"])
        with torch.no_grad():
            for weights, saved in zip(zero.single_partition_of_fp32_groups, own["weights"], strict=True):
                weights.copy_(saved)


def on_cpu(value: Any) -> Any:
    """The same with copies of its tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: on_cpu(part) for key, part in value.items()}
    return [on_cpu(part) for part in value] if isinstance(value, list | tuple) else value


StrategyRegistry.register("zero", ZeROStrategy, description="DeepSpeed's ZeRO, stage 2")
