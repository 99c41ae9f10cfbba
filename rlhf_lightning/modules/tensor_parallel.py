"""Lightning's strategy for tensor parallelism inside of data parallelism, for the modules whose optimizer Lightning steps."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.optim import Optimizer
from torchmetrics import Metric

from rlhf_lightning.errors import UserError
from rlhf_lightning.modules.optimization import norm_of
from rlhf_lightning.modules.strategies import FSDP2Strategy


class TensorParallelStrategy(FSDP2Strategy):
    """Groups of ranks compute the same rows, each with its part of every layer; weights are in shards between the groups."""

    def __init__(self, size: int = 2, timeout: float = 1800.0) -> None:
        """Set the size of a group.

        Args:
            size: Ranks that compute the same rows: neighbours, on one host.
            timeout: As for FSDP2.
        """
        super().__init__(timeout=timeout)
        self.size = size

    def setup_environment(self) -> None:
        """Form the groups.

        Raises:
            UserError: If the ranks can't be dealt out to them.
        """
        ranks = self.num_nodes * self.num_processes
        if self.num_processes % self.size:
            raise UserError(
                f"groups of {self.size} can't be formed from {self.num_processes} ranks a host; set trainer.devices"
            )
        self._data_parallel_size, self._tensor_parallel_size = ranks // self.size, self.size
        ModelParallelStrategy.setup_environment(self)

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Every rank builds the weights, of which it keeps its part."""
        with ModelParallelStrategy.tensor_init_context(self, empty_init):
            yield

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        assert self.device_mesh is not None
        for metric in trainer.lightning_module.modules():
            if isinstance(metric, Metric):  # the ranks of a group count the same rows
                metric.process_group = self.device_mesh["data_parallel"].get_group()
        self.precision_plugin.clip_grad_by_norm = clip_by_norm  # type: ignore[method-assign]


def clip_by_norm(optimizer: Optimizer, clip_val: float) -> None:
    """Lightning's own takes one norm of tensors that are cut in different ways, which torch refuses."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    factor = min(float(clip_val / (norm_of(gradients) + 1e-6)), 1.0)
    for gradient in gradients:
        gradient.mul_(factor)


StrategyRegistry.register(
    "tensor_parallel", TensorParallelStrategy, description="Groups of two ranks share every layer"
)
