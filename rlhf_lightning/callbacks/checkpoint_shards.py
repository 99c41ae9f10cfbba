"""Checkpoints of which every rank writes its part: a small file, and beside it a folder with the large tensors.

The folder has a name of its own in ``shards/`` and is whole before any file speaks of it, so a checkpoint is replaced by
replacing the small file, as ever; a folder of which no file speaks any more is deleted.
"""

import os
import pickle
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from rlhf_lightning.callbacks.disk import disk_error, flush_folder, scratch_of
from rlhf_lightning.models.shards import OPTIMIZERS, SHARDS, WEIGHTS, Shards, files_of_rank, write_shards


def in_shards(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint that is to be written has weights in shards."""
    weights = checkpoint["state_dict"]
    return isinstance(weights, dict) and any(isinstance(weight, DTensor) for weight in weights.values())


def set_aside(checkpoint: dict[str, Any], module: nn.Module, path: Path) -> tuple[dict[str, Any], str | None]:
    """Write the tensors of weights and optimizer state; every rank must call.

    Args:
        checkpoint: With this rank's shards.
        module: Whose it is.
        path: Of the small file.

    Returns:
        The checkpoint with a note instead of the tensors, and what the disk refused: None if all is written.
    """
    rest, tensors, ties = without_tensors(checkpoint, module)
    token = [secrets.token_hex(4)]
    dist.broadcast_object_list(token, src=0)
    folder = path.parent / SHARDS / f"{path.stem}-{token[0]}"
    files, failure = write_whole(tensors, folder)
    note = {"folder": folder.name, "files": files, "ties": ties}
    return {**rest, SHARDS: note}, failure


def without_tensors(
    checkpoint: dict[str, Any], module: nn.Module
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """What is small, the tensors by the names that they have in the shards, and for each tied weight the one it equals."""
    ties = {name: first for name, first in tied(module).items() if name in checkpoint["state_dict"]}
    tensors = {f"{WEIGHTS}{name}": weight for name, weight in checkpoint["state_dict"].items() if name not in ties}
    optimizers: list[dict[str, Any]] = []
    for number, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        small: dict[int, dict[str, Any]] = {}
        for index, values in optimizer["state"].items():
            small[index] = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
            large = {name: value for name, value in values.items() if isinstance(value, Tensor)}
            tensors |= {f"{OPTIMIZERS}{number}/{index}/{name}": value for name, value in large.items()}
        optimizers.append({"state": small, "param_groups": optimizer["param_groups"]})
    return {**checkpoint, "state_dict": {}, "optimizer_states": optimizers}, tensors, ties


def tied(module: nn.Module) -> dict[str, str]:
    """Names of weights that are another one again, with the first name of that."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if (other := first.setdefault(id(parameter), name)) != name:
            found[name] = other
    return found


def write_whole(tensors: dict[str, Tensor], folder: Path) -> tuple[dict[str, tuple[int, int]], str | None]:
    """Write a folder of shards under another name, and give it its own once all of it is on the disk.

    Returns:
        Its files, and what the disk refused; the same on every rank.
    """
    scratch, own, failure = scratch_of(folder), {}, None
    try:
        write_shards(tensors, scratch)
        own = files_of_rank(scratch)
    except (CheckpointException, OSError) as error:
        failure = refusal(error)
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, (own, failure))
    files = {name: file for part, _ in said for name, file in part.items()}
    failure = next((reason for _, reason in said if reason is not None), None)
    verdict = [failure]
    if dist.get_rank() == 0:
        verdict = [failure or named(files, scratch, folder)]
        shutil.rmtree(scratch, ignore_errors=True)  # it is still there if something failed
    dist.broadcast_object_list(verdict, src=0)
    return files, verdict[0]


def named(files: dict[str, tuple[int, int]], scratch: Path, folder: Path) -> str | None:
    """Give a folder that all ranks have written to its name; what stands against it, if something does."""
    if (fault := Shards(scratch, files, {}).fault(every_byte=False)) is not None:
        return f"{fault} for the first rank: sharded checkpoints need a file system that all ranks share"
    try:
        os.replace(scratch, folder)
        flush_folder(folder.parent)
    except OSError as error:
        return refusal(error)
    return None


def refusal(error: BaseException) -> str:
    """What the disk said, of whichever rank.

    Raises:
        BaseException: The error itself, if it was not the disk.
    """
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    for cause in causes:
        if (reason := disk_error(cause)) is not None:
            return reason
    raise error


def shards_of(checkpoint: dict[str, Any], path: str | Path) -> Shards:
    """The folder of which a small file speaks."""
    note = checkpoint[SHARDS]
    return Shards(Path(path).parent / SHARDS / note["folder"], note["files"], note["ties"])


def fault_of_shards(shards: Shards, every_byte: bool) -> str | None:
    """What is wrong with a folder of shards, in short; None if it is sound. Ranks that run together share the work."""
    together = dist.is_initialized() and dist.get_world_size() > 1
    names = sorted(shards.files)
    share = names[dist.get_rank() :: dist.get_world_size()] if together else names
    try:
        fault = shards.fault(share, every_byte=every_byte)
        if fault is None:
            shards.index()
    except pickle.UnpicklingError:
        fault = f"{shards.folder} holds more than tensors"
    if not together:
        return fault
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    return next((found for found in faults if found is not None), None)


def shapes(checkpoint: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of all weights of a checkpoint, by name, wherever they are."""
    shards = checkpoint.get(SHARDS)
    if not isinstance(shards, Shards):
        return {name: tuple(weight.shape) for name, weight in checkpoint["state_dict"].items()}
    found = {n.removeprefix(WEIGHTS): tuple(part.size) for n, part in shards.index().items() if n.startswith(WEIGHTS)}
    return found | {name: found[first] for name, first in shards.ties.items()}


def put_back(checkpoint: dict[str, Any], shards: Shards) -> dict[str, Any]:
    """A checkpoint as if one process had written it: with the tensors, whole, in this process's memory."""
    rest = {key: value for key, value in checkpoint.items() if key != SHARDS}
    rest["state_dict"] = {}
    for name, tensor in shards.whole().items():
        if name.startswith(WEIGHTS):
            rest["state_dict"][name.removeprefix(WEIGHTS)] = tensor
        else:
            number, index, key = name.removeprefix(OPTIMIZERS).split("/", 2)
            rest["optimizer_states"][int(number)]["state"][int(index)][key] = tensor
    rest["state_dict"] |= {name: rest["state_dict"][first] for name, first in shards.ties.items()}
    return rest


def remove_unused(folder: Path) -> None:
    """Delete the shards of which no checkpoint in a folder speaks; none, if one of the checkpoints can't be read."""
    if not (folder / SHARDS).is_dir():
        return
    used = set()
    for path in folder.glob("*.ckpt"):
        try:
            note = torch.load(path, map_location="meta", weights_only=True, mmap=True).get(SHARDS)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError):
            return
        used |= {note["folder"]} if note else set()
    for shards in (folder / SHARDS).iterdir():
        if shards.name not in used:
            shutil.rmtree(shards)
