"""Reference log-probabilities of preference rows: computed once, before training, and kept on disk."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from lightning.pytorch import LightningModule
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_lightning.data.cache import cache_folder, dataset_hash
from rlhf_lightning.data.collate import REFERENCE_COLUMNS
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.logprobs import sequence_logprobs
from rlhf_lightning.models.frozen import Frozen
from rlhf_lightning.modules.half_precision import place_reference

log = logging.getLogger(__name__)


def add_reference_logps(module: LightningModule, reference: Frozen) -> None:
    """Give every preference row of the data module the reference's log-probabilities of its two responses.

    Args:
        module: In ``configure_model``, of a run that trains; every rank must call.
        reference: On its device, or about to be moved there.

    Raises:
        UserError: If the rows are not known beforehand, or what the cache holds is not of these rows.
    """
    trainer: Any = module.trainer
    datamodule = trainer.datamodule
    rows: dict[str, Dataset] = getattr(datamodule, "rows", {})
    if "train" not in rows or "chosen_ids" not in rows["train"].column_names:
        raise UserError(
            "precompute_reference needs preference rows that are known before training; set it to false for a stream"
        )
    place_reference(module, reference)
    datamodule.fingerprint()  # of the rows alone, which a run that computes each step has too
    of_network = network_hash(module, reference)
    for name, split in rows.items():
        key = json.dumps([of_network, dataset_hash(split), str(trainer.precision)])
        file = cache_folder() / f"reference-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        logps = read(file, len(split))
        if not together(module, logps is not None):
            logps = compute(module, reference, split)
            if trainer.is_global_zero:
                write(file, logps)
        assert logps is not None
        for column, values in zip(REFERENCE_COLUMNS, logps.T, strict=True):
            split = split.add_column(column, values.tolist())
        rows[name] = split


@torch.no_grad()
def compute(module: LightningModule, reference: Frozen, rows: Dataset) -> Tensor:
    """The reference's log-probabilities of chosen and rejected. Shape (rows, 2), float32, on the CPU.

    Batches of like length, dealt out to the ranks; all have equally many, for FSDP2 gathers weights in each.
    """
    trainer: Any = module.trainer
    datamodule, device = trainer.datamodule, trainer.strategy.root_device
    order = torch.tensor(rows["length"]).argsort(stable=True).tolist()
    size, ranks = datamodule.batch_size, trainer.world_size
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    batches += [batches[-1]] * (-len(batches) % ranks)
    logps = torch.zeros(len(rows), 2, dtype=torch.float32, device=device)
    collate = datamodule.collator()
    for batch in batches[trainer.global_rank :: ranks]:
        pairs = collate((rows[batch], 1.0))
        inputs = (x.to(device) for x in (pairs.input_ids, pairs.attention_mask, pairs.response_mask))
        with trainer.precision_plugin.forward_context():
            output = reference(*inputs, share_prompts=True)
        mask = pairs.response_mask[:, 1:].to(device)
        logps[batch] = torch.stack(sequence_logprobs(output.logprobs, mask).chunk(2), dim=1)
    # Zero where another rank has the number, which is below zero: the sum would count a batch that two have done twice.
    return trainer.strategy.reduce(logps, reduce_op="min").cpu() if ranks > 1 else logps.cpu()


def network_hash(module: LightningModule, reference: Frozen) -> str:
    """A hash of the reference's weights and shape, from the first rank; every rank must call."""
    digest = hashlib.sha256()
    state = reference.state()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    network: Any = reference.network
    digest.update(network.network.config.to_json_string().encode())
    return module.trainer.strategy.broadcast(digest.hexdigest())


def together(module: LightningModule, have: bool) -> bool:
    """Whether all ranks do: a cache that only some can read is read by none."""
    return bool(module.trainer.strategy.reduce_boolean_decision(have, all=True))


def read(file: Path, rows: int) -> Tensor | None:
    """What an earlier run computed; None where there is nothing.

    Raises:
        UserError: If it is of other rows, or damaged.
    """
    if not file.exists():
        return None
    try:
        logps = load_file(file)["logps"]
    except (SafetensorError, KeyError, OSError) as error:
        raise UserError(f"reference log-probabilities at {file} can't be read ({error}); delete the file") from error
    if logps.shape != (rows, 2):
        raise UserError(
            f"reference log-probabilities at {file} are of {len(logps)} rows, the data has {rows}: delete the file"
        )
    log.info("reference log-probabilities of %d pairs read from %s", rows, file)
    return logps


def write(file: Path, logps: Tensor) -> None:
    """Keep them, whole or not at all.

    Raises:
        UserError: If the folder can't be written.
    """
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"logps": logps.contiguous()}, scratch)
        os.replace(scratch, file)
    except OSError as error:
        raise UserError(f"{file} can't be written ({error}); set RLHF_LIGHTNING_CACHE") from error
