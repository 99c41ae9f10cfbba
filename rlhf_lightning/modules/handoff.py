"""What a module takes over from the data module, and the checks on it."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.data.chat import ensure_chat_template
from rlhf_lightning.data.tokenizers import load_tokenizer, repair_pad_token, same_tokenizer
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.sharding import shard


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
    limit = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    rows: dict[str, Dataset] = getattr(getattr(module._trainer, "datamodule", None), "rows", {})
    longest = max((max(part["length"]) for part in rows.values() if len(part)), default=0) + new_tokens
    if limit is not None and longest > limit:
        raise UserError(
            f"the longest row has {longest} tokens{' with what is generated' if new_tokens else ''}, the model reads {limit}; "
            f"lower {'data.max_prompt_length or model.sampling.max_new_tokens' if new_tokens else 'data.max_length'}"
        )


def shard_if_asked(module: LightningModule, network: nn.Module) -> None:
    """Under FSDP2 (``ModelParallelStrategy``), shard a network over the ranks; elsewhere nothing."""
    if isinstance(getattr(module._trainer, "strategy", None), ModelParallelStrategy):
        shard(network, module.device_mesh["data_parallel"])  # type: ignore[index]


def ready_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """A folder's tokenizer with a usable pad token and a chat template, as every stage uses it."""
    tokenizer = load_tokenizer(path)
    repair_pad_token(tokenizer)
    ensure_chat_template(tokenizer)
    return tokenizer
