"""What must hold of an exported folder before another stage builds on it."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig

from rlhf_lightning.data.tokenizers import load_tokenizer, same_tokenizer
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.ensemble import member_folders
from rlhf_lightning.models.export import ADAPTER


def check_export(folder: Path) -> str:
    """Check that an export is complete, has sane special tokens, and has its head in the checkpoint.

    Args:
        folder: An export: of one network, or of an ensemble with a folder for each member.

    Returns:
        What was found, for a person to read.

    Raises:
        UserError: If something is missing or can't be right.
    """
    if members := member_folders(str(folder)):
        first, *_ = [check_network(Path(member)) for member in members]
        return f"{len(members)} members: {first}"
    if (folder / ADAPTER / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds an adapter alone, and the next stage reads a model: write it with python -m rlhf_lightning export "
            f"--run {folder.parent}, and leave export.merge out"
        )
    return check_network(folder)


def check_network(folder: Path) -> str:
    """As :func:`check_export`, of a folder with one network."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no exported model")
    tokenizer, config = load_tokenizer(str(folder)), AutoConfig.from_pretrained(folder)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(f"{folder}: pad and EOS are not two tokens")
    for name in ("pad", "eos"):
        if getattr(config, f"{name}_token_id") != getattr(tokenizer, f"{name}_token_id"):
            raise UserError(f"{folder}: the {name} token of config.json is not the tokenizer's")
    architecture = (config.architectures or ["?"])[0]
    if architecture.endswith("ForSequenceClassification"):
        missing = sorted(head_names(config) - set(weight_names(folder)))
        if missing:
            raise UserError(f"{folder}: the reward head is not in the checkpoint ({missing[0]} is missing)")
    return f"{architecture}, pad {tokenizer.pad_token_id}, EOS {tokenizer.eos_token_id}, head loaded"


def head_names(config: PretrainedConfig) -> set[str]:
    """Names of a classifier's weights outside its trunk: "score.weight" of decoders; encoders have others."""
    with torch.device("meta"):
        network = AutoModelForSequenceClassification.from_config(config)
    return {name for name, _ in network.named_parameters() if not name.startswith(f"{network.base_model_prefix}.")}


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
