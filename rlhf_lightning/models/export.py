"""Write a network as a Hugging Face folder that plain transformers loads, whole or not at all."""

import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.data.tokenizers import without_added_pad
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.adapter_files import Adapter, write_adapter
from rlhf_lightning.models.loading import source_dtype
from rlhf_lightning.models.merging import base_dtype, skeleton

log = logging.getLogger(__name__)

ExportDtype = Literal["source", "trained"]
ADAPTER = "adapter"  # in a run's export
# Settings of sampling in a generation config, with the values that change nothing.
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "top_h": None, "typical_p": 1.0}
SAMPLING |= {"epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
RECOMMENDATIONS = (
    *SAMPLING,
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "exponential_decay_length_penalty"),
    *("min_new_tokens", "max_new_tokens", "min_length", "max_length"),
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
)
MEMBER = "member_"  # how the folders of an ensemble's members begin, and their names in a state dict


def export_folder(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    weights: dict[str, Any] | None = None,
    adapter: Adapter | None = None,
    dtype: ExportDtype = "source",
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
        dtype: Of the weights: "source" for that of the folder which the network was loaded from, where it has fewer bits;
            "trained" for the one that the network has.

    Returns:
        ``folder``.

    Raises:
        UserError: If the disk is full, or the place can't be written to. What was there is there still.
    """
    folder = Path(folder)
    check_replaceable(folder)
    with Writing(folder):
        _export(network, tokenizer, folder, weights, adapter, dtype)
    return folder


def export_members(
    members: Sequence[tuple[PreTrainedModel, dict[str, Any] | None]],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    dtype: ExportDtype = "source",
) -> Path:
    """Write the networks of an ensemble, each into a folder below one that is whole or not there at all.

    Args:
        members: Each with its state dict, None where it holds that itself.
        tokenizer: The one that all were trained with.
        folder: Where to; replaced if it exists.
        dtype: As in :func:`export_folder`.

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
                _export(network, tokenizer, scratch / f"{MEMBER}{number}", weights, None, dtype)
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
    dtype: ExportDtype,
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    weight: Any = network.get_input_embeddings().weight
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= weight.shape[0]:
        tokenizer = without_added_pad(tokenizer)  # the base of an adapter has got no row for it
    try:
        if network.can_generate():
            network.generation_config = generation_config(network, tokenizer)
        if weights is None or weights:
            narrower = narrower_source(network) if dtype == "source" else None
            plain = network
            if narrower is not None:
                log.info(
                    "%s: weights are written in %s, as the model had them that training started from", folder, narrower
                )
                weights = in_dtype(network.state_dict() if weights is None else weights, narrower)
                plain = skeleton(network, narrower)
            elif adapter is not None:
                plain = skeleton(network)
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


def narrower_source(network: PreTrainedModel) -> torch.dtype | None:
    """The precision of the folder that a network was loaded from, if it has fewer bits than the network's own."""
    source = source_dtype(network)
    return source if source is not None and source.itemsize < base_dtype(network).itemsize else None


def in_dtype(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating-point weights in another precision. Weights that share memory, such as a tied head, share it afterwards too."""
    cast: dict[tuple[int, torch.Size], Tensor] = {}
    result = {}
    for name, weight in weights.items():
        weight = weight.detach()
        key = weight.data_ptr(), weight.shape
        if weight.is_floating_point() and key not in cast:
            cast[key] = weight.to(dtype)
        result[name] = cast[key] if weight.is_floating_point() else weight
    return result


def generation_config(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The recommendations of the model that the network came from, with the special ids of the tokenizer and every EOS.

    It samples unless the model recommends greedy decoding. Training and evaluation here never read it.
    """
    own = network.generation_config
    kept = {name: getattr(own, name, None) for name in RECOMMENDATIONS}
    if (own.num_beams or 1) > 1:
        kept |= {name: getattr(own, name, None) for name in ("num_beams", "length_penalty", "early_stopping")}
    # transformers does not save a greedy config that has settings of sampling.
    sampled = any(kept[name] not in (None, neutral) for name, neutral in SAMPLING.items())
    kept["do_sample"] = own.do_sample is not False or sampled
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=eos_ids(network, tokenizer),
        **{name: value for name, value in kept.items() if value is not None},
    )


def recommendations(network: PreTrainedModel) -> str:
    """What a model's generation config recommends for sampling, such as "temperature 0.6, top_p 0.95"; "" for nothing."""
    own = network.generation_config
    neutral = SAMPLING | {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    found = {name: getattr(own, name, None) for name in neutral}
    return ", ".join(f"{name} {value}" for name, value in found.items() if value not in (None, neutral[name]))


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
