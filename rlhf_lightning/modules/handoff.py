"""What a module takes over from the data module, and the checks on it."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from datasets import Dataset
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.data.tokenizers import load_tokenizer, repair_pad_token, same_tokenizer
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.adapters import has_adapter
from rlhf_lightning.models.attention import rules_of
from rlhf_lightning.models.sharding import shard, sharing
from rlhf_lightning.models.tensor_parallel import split
from rlhf_lightning.modules.tensor_parallel import TensorParallelStrategy
from rlhf_lightning.modules.zero import ZeROStrategy


def training_tokenizer(module: LightningModule, *paths: str | None) -> PreTrainedTokenizerBase:
    """The data module's tokenizer, held against that of every model folder that is handed over; else the first folder's.

    Args:
        module: The module that is being configured.
        paths: Folders or hub ids of its models; None for one from scratch.

    Raises:
        UserError: If two differ: ids would mean one token to one network and another to the next.
    """
    datamodule: Any = getattr(module._trainer, "datamodule", None)
    tokenizer = getattr(datamodule, "tokenizer", None) or getattr(module, "tokenizer", None)
    for path in paths:
        if path is None or not Path(path).is_dir():
            continue
        other = ready_tokenizer(path)
        if tokenizer is None:
            tokenizer = other
        elif difference := same_tokenizer(tokenizer, other):
            raise UserError(f"the tokenizer of {path} is not the one that the data was tokenized with: {difference}")
    if tokenizer is None:
        hub = [path for path in paths if path is not None]
        if not hub:
            raise UserError("a model from scratch needs a data module whose tokenizer it can take over")
        tokenizer = ready_tokenizer(hub[0])
    return tokenizer


def check_context(module: LightningModule, network: PreTrainedModel, new_tokens: int = 0) -> None:
    """Hold the longest tokenized row, and what is to be generated after it, against what the network can read.

    Raises:
        UserError: If a row is longer than the positions that the network knows.
    """
    known = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    # Beyond the second bound rows of one batch change each other: see models/length_rules.py.
    limit = min((bound for bound in (known, rules_of(network).together) if bound is not None), default=None)
    rows: dict[str, Dataset] = getattr(getattr(module._trainer, "datamodule", None), "rows", {})
    longest = max((max(part["length"]) for part in rows.values() if len(part)), default=0) + new_tokens
    if limit is not None and longest > limit:
        raise UserError(
            f"the longest row has {longest} tokens{' with what is generated' if new_tokens else ''}, the model reads {limit}; "
            f"lower {'data.max_prompt_length or model.sampling.max_new_tokens' if new_tokens else 'data.max_length'}"
        )


def shard_if_asked(module: LightningModule, network: nn.Module | None) -> None:
    """Under FSDP2 (``ModelParallelStrategy``), shard a network over the ranks; elsewhere, or for no network, nothing.

    Raises:
        UserError: If the strategy is FSDP1 and the module steps its optimizer itself, or Lightning's DeepSpeed.
    """
    strategy = getattr(module._trainer, "strategy", None)
    if isinstance(strategy, FSDPStrategy) and not module.automatic_optimization:
        raise UserError(
            f"{type(module).__name__} steps its own optimizer, which FSDP1 can't follow; use -c configs/strategy/fsdp2.yaml"
        )
    if isinstance(strategy, TensorParallelStrategy) and not module.automatic_optimization:
        raise UserError(f"{type(module).__name__} has no tensor parallelism yet; use -c configs/strategy/fsdp2.yaml")
    if isinstance(strategy, DeepSpeedStrategy) and not isinstance(strategy, ZeROStrategy):
        raise UserError("Lightning's deepspeed writes folders as checkpoints; use -c configs/strategy/deepspeed.yaml")
    if network is not None and isinstance(strategy, ModelParallelStrategy):
        if not all(parameter.is_floating_point() for parameter in network.parameters()):
            raise UserError(
                "quantized weights can't be sharded over ranks; use trainer.strategy ddp, or no quantization"
            )
        mesh: Any = module.device_mesh
        if isinstance(strategy, TensorParallelStrategy):
            if any(has_adapter(part) for part in network.modules()):
                raise UserError("an adapter has no tensor parallelism here; use trainer.strategy ddp or fsdp2")
            split(network, mesh["tensor_parallel"])
        shard(network, mesh["data_parallel"], strategy.root_device)


def sharing_if_asked(module: LightningModule) -> AbstractContextManager[None]:
    """Inside, under FSDP2, a reward's networks are built in shards; elsewhere nothing happens."""
    strategy = getattr(module._trainer, "strategy", None)
    if isinstance(strategy, ModelParallelStrategy):
        return sharing(module.device_mesh["data_parallel"], strategy.root_device)  # type: ignore[index]
    return nullcontext()


def ready_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Return a folder's tokenizer with a usable pad token, as every stage uses it."""
    tokenizer = load_tokenizer(path)
    repair_pad_token(tokenizer)
    return tokenizer
