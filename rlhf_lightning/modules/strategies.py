"""Lightning's FSDP2 strategy with the default that everybody wants, shards over all ranks, and checkpoints that it can read."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, OptimStateKeyType

WHOLE = StateDictOptions(full_state_dict=True)


class FSDP2Strategy(ModelParallelStrategy):
    """``ModelParallelStrategy`` whose shards span every rank; Lightning's own would split tensors within a node."""

    def __init__(self, timeout: float = 1800.0) -> None:
        """Args: seconds until a collective that some rank does not join is given up."""
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timedelta(seconds=timeout))

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    # Lightning's own loads weight by weight, which torch refuses for weights in shards, and passes over the checkpoint IO.

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.model is not None
        set_model_state_dict(self.model, checkpoint["state_dict"], options=WHOLE)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.model is not None
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            named = FullyShardedDataParallel.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_NAME, self.model)
            set_optimizer_state_dict(self.model, optimizer, named, options=WHOLE)


StrategyRegistry.register(
    "fsdp2", FSDP2Strategy, description="Fully sharded data parallel (fully_shard) over all ranks"
)
