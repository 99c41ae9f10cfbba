"""Lightning's FSDP2 strategy with the one default that everybody wants: shard over all ranks."""

from datetime import timedelta

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry


class FSDP2Strategy(ModelParallelStrategy):
    """``ModelParallelStrategy`` whose shards span every rank; Lightning's own would split tensors within a node."""

    def __init__(self, timeout: float = 1800.0) -> None:
        """Args: seconds until a collective that some rank does not join is given up."""
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timedelta(seconds=timeout))

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


StrategyRegistry.register(
    "fsdp2", FSDP2Strategy, description="Fully sharded data parallel (fully_shard) over all ranks"
)
