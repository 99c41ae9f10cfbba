"""Write a network as a Hugging Face folder that plain transformers loads, whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.adapter_files import Adapter, write_adapter
from rlhf_lightning.models.merging import skeleton

ADAPTER = "adapter"  # in a run's export
MEMBER = "member_"  # how the folders of an ensemble's members begin, and their names in a state dict


def export_folder(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    weights: dict[str, Any] | None = None,
    adapter: Adapter | None = None,
) -> Path:
    """Write weights (safetensors), config, generation config, tokenizer and chat template.

    Written beside its place and renamed, so that a folder with this name is always whole.

    Args:
        network: A causal language model or sequence classifier.
        tokenizer: The one it was trained with.
        folder: Where to; replaced if it exists.
        weights: The network's state dict, where the network itself holds only shards or has an adapter; empty to write the
            adapter alone.
        adapter: Goes into ``adapter/`` below the folder.

    Returns:
        ``folder``.

    Raises:
        UserError: If the disk is full, or the place can't be written to. What was there is there still.
    """
    folder = Path(folder)
    check_replaceable(folder)
    with Writing(folder):
        _export(network, tokenizer, folder, weights, adapter)
    return folder


def export_members(
    members: Sequence[tuple[PreTrainedModel, dict[str, Any] | None]],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
) -> Path:
    """Write the networks of an ensemble, each into a folder below one that is whole or not there at all.

    Args:
        members: Each with its state dict, None where it holds that itself.
        tokenizer: The one that all were trained with.
        folder: Where to; replaced if it exists.

    Returns:
        ``folder``.

    Raises:
        UserError: As :func:`export_folder`.
    """
    folder = Path(folder)
    check_replaceable(folder)
    with Writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            for number, (network, weights) in enumerate(members):
                _export(network, tokenizer, scratch / f"{MEMBER}{number}", weights, None)
            scratch.chmod(0o755)
            _replace_folder(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _export(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, Any] | None,
    adapter: Adapter | None,
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        if network.can_generate():
            network.generation_config = generation_config(network, tokenizer)
        if weights is None or weights:
            plain = skeleton(network) if adapter is not None else network
            plain.save_pretrained(scratch, state_dict=weights)
            tokenizer.save_pretrained(scratch)
        if adapter is not None:
            write_adapter(scratch / ADAPTER, adapter)
            tokenizer.save_pretrained(scratch / ADAPTER)
        for place in (scratch, *scratch.rglob("*")):  # mkdtemp and safetensors keep everybody else out
            place.chmod(0o755 if place.is_dir() else 0o644)
        _replace_folder(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_replaceable(folder: str | Path) -> None:
    """See that an export may be written to a place: nothing is there yet, or an earlier export, which is replaced.

    Raises:
        UserError: If a file is there, or a folder that holds anything but an export; or if nothing can be written there.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; an export is a folder: give another place")
    if folder.is_dir() and any(folder.iterdir()) and not is_export(folder):
        raise UserError(f"{folder} holds something else than an export, which would be lost; give another folder")
    with Writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))


def is_export(folder: Path) -> bool:
    """Whether a folder was written by :func:`export_folder` or :func:`export_members`, and nothing else is in it."""
    models = [folder, *folder.glob(f"{MEMBER}*"), folder / ADAPTER]
    made = any((model / name).is_file() for model in models for name in ("config.json", "adapter_config.json"))
    return made and not any((folder / name).exists() for name in (".git", "checkpoints"))


class Writing:
    """What a disk refuses, as one line. OSError is not all: the writers of weights and tokenizers are no Python."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __enter__(self) -> None:
        """Nothing: only what is raised is of interest."""

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        if isinstance(error, OSError | SafetensorError) or (error is not None and "os error" in str(error)):
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise UserError(f"{self.place} can't be written ({reason}); what was there before is unchanged") from error


def _replace_folder(new: Path, folder: Path) -> None:
    """The old folder stands aside until the new one is in its place: killed in between, a whole one is there still."""
    aside = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
    try:
        os.replace(new, folder)
    except OSError:
        if aside.exists():
            os.replace(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def generation_config(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The special ids of the tokenizer, with every EOS that the network knew."""
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=eos_ids(network, tokenizer),
        do_sample=True,
    )


def eos_ids(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a response: the tokenizer's EOS and those of the generation config (some models have several)."""
    known = getattr(getattr(network, "generation_config", None), "eos_token_id", None)
    more = known if isinstance(known, list) else [known]
    return sorted({i for i in [tokenizer.eos_token_id, *more] if i is not None})


def replace_file(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
