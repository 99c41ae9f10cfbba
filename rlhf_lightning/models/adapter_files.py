"""Adapters on disk: folders that plain peft reads, which also know the base that they were trained on."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf_lightning.errors import UserError

WEIGHTS, ABOUT = "adapter_model.safetensors", "rlhf_lightning.json"
PREFIX = "base_model.model."  # of every name in peft's files
NORMALISATION = {"reward_gain", "reward_bias", "reward_temperature"}  # of a reward model's config
HEAD = "score"  # peft keeps a scalar head among `modules_to_save`


def needs_peft() -> Any:
    """The module peft, which is imported by those alone who use adapters.

    Raises:
        UserError: If it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError("an adapter needs peft: pip install 'rlhf_lightning[lora]'") from error
    return peft


class Adapter(NamedTuple):
    """What a folder holds.

    Attributes:
        config: A ``peft.LoraConfig``.
        weights: By peft's names, without its prefix.
        about: What this project knows beyond that: ``base_sha256``, and of reward models ``reward_gain``,
            ``reward_bias`` and ``reward_temperature``. Empty for folders that others wrote.
    """

    config: Any
    weights: dict[str, Tensor]
    about: dict[str, Any]

    @property
    def has_head(self) -> bool:
        """Whether there is a scalar head among the weights."""
        return f"{HEAD}.weight" in self.weights


def read_adapter(path: str) -> Adapter:
    """An adapter's settings and weights.

    Args:
        path: Folder or hub id.

    Raises:
        UserError: If there is none, or it is more than LoRA matrices and a scalar head.
    """
    peft = needs_peft()
    try:
        config = peft.PeftConfig.from_pretrained(path)
        weights = peft.utils.load_peft_weights(path, device="cpu")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no adapter folder: {str(error).splitlines()[0]}") from error
    if not isinstance(config, peft.LoraConfig):
        raise UserError(f"{path} holds {config.peft_type.value}, not LoRA")
    if others := set(config.modules_to_save or ()) - {HEAD}:
        raise UserError(
            f"{path} holds whole layers beside its adapter ({', '.join(sorted(others))}); merge it into its base"
        )
    config.modules_to_save, config.lora_dropout, config.inference_mode = None, 0.0, False
    about = Path(path, ABOUT)
    return Adapter(
        config,
        {name.removeprefix(PREFIX): weight for name, weight in weights.items()},
        json.loads(about.read_text()) if about.is_file() else {},
    )


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write a folder that ``peft.PeftModel.from_pretrained(base, folder)`` reads."""
    folder.mkdir(parents=True)
    config = copy.copy(adapter.config)
    config.modules_to_save = [HEAD] if adapter.has_head else None
    config.inference_mode = True  # as peft's own folders have it: a reader that trains asks for that
    if isinstance(config.target_modules, set):  # in an order that is the same in every process
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(folder)
    weights = {PREFIX + name: weight.detach().cpu().contiguous() for name, weight in adapter.weights.items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / ABOUT).write_text(json.dumps(adapter.about, indent=2) + "\n", encoding="utf-8")


def base_sha256(path: str, revision: str | None = None) -> str:
    """Tells one base from another, however its files are cut and in whatever precision it is loaded.

    Three rows of every tensor are looked at, not all: that takes no time, and training a model changes every row.

    Args:
        path: Folder in Hugging Face format, or hub id of one that has been downloaded.
        revision: Of the hub repository.
    """
    folder = Path(path)
    if not folder.is_dir():
        folder = Path(snapshot_download(path, revision=revision, local_files_only=True))
    sums: dict[str, bytes] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        # On the CPU, even where a rank builds its networks without weights.
        with torch.device("cpu"), safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (no mapping)
                rows = tensors.get_slice(name)
                shape = rows.get_shape()
                seen = [rows[i : i + 1] for i in sorted({0, shape[0] // 2, shape[0] - 1})] if shape else [rows[...]]
                data = b"".join(row.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for row in seen)
                sums[name] = hashlib.sha256(f"{name} {shape}".encode() + data).digest()
    return hashlib.sha256(b"".join(sums[name] for name in sorted(sums))).hexdigest()
