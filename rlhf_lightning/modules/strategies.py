"""Lightning's FSDP2 strategy with the default that everybody wants, shards over all ranks, and checkpoints that it can read."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from rlhf_lightning.models.first_rank import FirstRankBuilds
from rlhf_lightning.models.shards import OPTIMIZERS, SHARDS, WEIGHTS, Shards

WHOLE = StateDictOptions(full_state_dict=True)


class FSDP2Strategy(ModelParallelStrategy):
    """``ModelParallelStrategy`` whose shards span every rank; Lightning's own would split tensors within a node.

    The first rank reads or draws the weights and hands the others their shards, so that a host holds them once.
    """

    def __init__(self, timeout: float = 1800.0, sharded_checkpoints: bool = False) -> None:
        """Set the times and the kind of checkpoint; either kind can be read, whatever is written.

        Args:
            timeout: Seconds until a collective that some rank does not join is given up.
            sharded_checkpoints: Every rank writes its shards of weights and optimizer state into a folder beside the
                checkpoint, on a file system that all ranks share. Else the first rank gathers and writes all of it.
        """
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timedelta(seconds=timeout))
        self.sharded_checkpoints = sharded_checkpoints

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """What surrounds ``configure_model``."""
        with super().tensor_init_context(empty_init), FirstRankBuilds():
            yield

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    # ---------------------------------------------------------------- writing

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's shards; or all weights on the first rank, nothing on the others."""
        if not self.sharded_checkpoints:
            return super().lightning_module_state_dict()
        assert self.model is not None
        return get_model_state_dict(self.model)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As the optimizer itself would give it: shards, or whole tensors on the first rank and nothing on the others."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        state = optimizer.state_dict()
        if self.sharded_checkpoints:
            return state
        whole: dict[int, dict[str, Any]] = {}
        for number, values in state["state"].items():
            gathered = {name: gathered_on_cpu(value, self.is_global_zero) for name, value in values.items()}
            whole |= {number: gathered} if self.is_global_zero else {}
        return {"state": whole, "param_groups": state["param_groups"]}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if self.sharded_checkpoints:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath)  # every rank writes
        else:
            super().save_checkpoint(checkpoint, filepath, storage_options)

    # ---------------------------------------------------------------- reading
    # Lightning's own loads weight by weight, which torch refuses for weights in shards, and passes over the checkpoint IO.

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.model is not None
        shards = checkpoint.get(SHARDS)
        if not isinstance(shards, Shards):
            set_model_state_dict(self.model, checkpoint["state_dict"], options=WHOLE)
            return
        # Shards are read into the weights themselves; what is no shard goes through load_state_dict, which may refuse it.
        own: dict[str, Any] = get_model_state_dict(self.model)
        own = {name: tensor if isinstance(tensor, DTensor) else tensor.clone() for name, tensor in own.items()}
        saved = shards.index()
        shards.read({name: own[name.removeprefix(WEIGHTS)] for name in saved if name.startswith(WEIGHTS)})
        self.model.load_state_dict(own, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        shards = checkpoint.get(SHARDS)
        for number, (optimizer, saved) in enumerate(zip(self.optimizers, checkpoint["optimizer_states"], strict=True)):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state: dict[int, dict[str, Any]] = {
                index: {name: shared_out(value, parameters[index]) for name, value in values.items()}
                for index, values in saved["state"].items()
            }
            tensors: dict[str, Tensor] = {}
            if isinstance(shards, Shards):
                prefix = f"{OPTIMIZERS}{number}/"
                for name, part in shards.index().items():
                    if name.startswith(prefix):
                        index, key = name.removeprefix(prefix).split("/", 1)
                        tensors[name] = empty(parameters[int(index)], part.size, part.properties.dtype)
                        state.setdefault(int(index), {})[key] = tensors[name]
                shards.read(tensors)
            optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


def gathered_on_cpu(value: Any, wanted: bool) -> Any:
    """A tensor in shards as a whole one; every rank must call, those that do not want it get nothing."""
    if not isinstance(value, DTensor):
        return value.cpu() if isinstance(value, Tensor) else value
    whole = value.full_tensor()
    return whole.cpu() if wanted else None


def shared_out(value: Any, parameter: Tensor) -> Any:
    """What belongs to an entry of an optimizer's state on this rank: its shard, if it is of the parameter's shape."""
    if not isinstance(value, Tensor) or not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    own: Any = torch.empty_like(parameter, dtype=value.dtype)
    whole = value.to(own.device)
    own.to_local().copy_(distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None).to_local())
    return own


def empty(parameter: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Room for an entry of an optimizer's state: in shards if it is of the parameter's shape."""
    if parameter.shape == shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype)


StrategyRegistry.register(
    "fsdp2", FSDP2Strategy, description="Fully sharded data parallel (fully_shard) over all ranks"
)
