"""What must hold of an exported folder before another stage builds on it."""

import json
from pathlib import Path

from safetensors import safe_open
from transformers import AutoConfig

from rlhf_lightning.data.tokenizers import load_tokenizer, same_tokenizer
from rlhf_lightning.errors import UserError


def check_export(folder: Path) -> str:
    """Whole, with sane special tokens, and with its head in the checkpoint.

    Args:
        folder: An export.

    Returns:
        What was found, for a person to read.

    Raises:
        UserError: If something is missing or can't be right.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no exported model")
    tokenizer, config = load_tokenizer(str(folder)), AutoConfig.from_pretrained(folder)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(f"{folder}: pad and EOS are not two tokens")
    for name in ("pad", "eos"):
        if getattr(config, f"{name}_token_id") != getattr(tokenizer, f"{name}_token_id"):
            raise UserError(f"{folder}: the {name} token of config.json is not the tokenizer's")
    architecture = (config.architectures or ["?"])[0]
    if architecture.endswith("ForSequenceClassification") and not any(
        k.startswith("score.") for k in weight_names(folder)
    ):
        raise UserError(f"{folder}: the reward head is not in the checkpoint")
    return f"{architecture}, pad {tokenizer.pad_token_id}, EOS {tokenizer.eos_token_id}, head loaded"


def weight_names(folder: Path) -> list[str]:
    """Names of all tensors in a folder's safetensors."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return sorted(json.loads(index.read_text())["weight_map"])
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        return sorted(weights.keys())


def check_same_text(upstream: Path, downstream: Path) -> None:
    """Tokenizer and chat template of two stages are the same.

    Raises:
        UserError: If not, with the difference.
    """
    difference = same_tokenizer(load_tokenizer(str(upstream)), load_tokenizer(str(downstream)))
    if difference:
        raise UserError(f"{upstream} and {downstream} read text differently: {difference}")
