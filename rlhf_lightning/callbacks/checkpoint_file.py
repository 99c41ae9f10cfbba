"""Checkpoint files that are whole or not there, and that are checked before anything is built on them."""

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule

from rlhf_lightning.callbacks.checkpoint_shards import (
    fault_of_shards,
    in_shards,
    put_back,
    remove_unused,
    set_aside,
    shapes,
    shards_of,
)
from rlhf_lightning.callbacks.disk import SCRATCH, disk_error, flush_folder, scratch_of
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.sharding import is_sharded
from rlhf_lightning.models.shards import SHARDS

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place, and gives it its name once all of it is on the disk.

    Killed at any moment, the file of that name is the one of before or the new one, never a torn one. What ``last.ckpt``
    held before is kept as ``previous.ckpt``. Where weights are in shards, every rank writes its own first.
    """

    def __init__(self, module: LightningModule) -> None:
        """Args: the module that checkpoints are loaded into; they are held against it."""
        self.module = module

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write, flush to the disk, rename. Every rank must call with a checkpoint in shards, else the first alone.

        Raises:
            UserError: If the disk is full or the file can't be written; names it and says how to go on.
        """
        path = Path(path)
        if in_shards(checkpoint):
            checkpoint, reason = set_aside(checkpoint, self.module, path)
            if reason is not None:
                raise UserError(f"{path} could not be written: {reason}; {how_to_go_on(path)}")
            if dist.get_rank() > 0:
                return
        scratch = scratch_of(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(checkpoint, scratch)
            if path.name == LAST and path.exists():
                keep(path, path.with_name(PREVIOUS))
            os.replace(scratch, path)
            flush_folder(path.parent)
            remove_unused(path.parent)
        except (OSError, RuntimeError) as error:  # torch wraps what the file raised in a RuntimeError
            scratch.unlink(missing_ok=True)
            reason = disk_error(error)
            if reason is None:
                raise
            raise UserError(f"{path} could not be written: {reason}; {how_to_go_on(path)}") from error

    def load_checkpoint(
        self, path: str | Path, map_location: Callable | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read tensors and plain data; every rank must call.

        Returns:
            The checkpoint. Where it is in shards and so is the module, they are left where they are, for each rank to read
            its own: under "shards" is a :class:`rlhf_lightning.models.shards.Shards`.

        Raises:
            UserError: If the file is damaged, or of another module or another size of model.
        """
        if not Path(path).exists():  # a URL
            return super().load_checkpoint(path, map_location, weights_only=True)
        sharded = is_sharded(self.module)
        check_sound(path)
        # Ranks that keep their shards alone need not all hold the whole file: they look at the same pages of it.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=sharded)
        if SHARDS in checkpoint:
            shards = shards_of(checkpoint, path)
            checkpoint = {**checkpoint, SHARDS: shards} if sharded else put_back(checkpoint, shards)
        check_fits(self.module, checkpoint, path)
        return checkpoint


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """All of it, to the disk."""
    with path.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())


def keep(path: Path, other: Path) -> None:
    """Give a file a second name; where the file system knows no second names, copy it."""
    scratch = scratch_of(other)
    scratch.unlink(missing_ok=True)
    try:
        os.link(path, scratch)
    except OSError:
        shutil.copyfile(path, scratch)
    os.replace(scratch, other)


def how_to_go_on(path: Path) -> str:
    """After a checkpoint that could not be written."""
    last = path.with_name(LAST)
    if last.exists():
        return f"{last} is whole: make room and run the same command with --ckpt_path last"
    return "make room and run the same command with --overwrite true"


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint's content, on the CPU: tensors and plain data, never a pickle of anything else.

    Raises:
        UserError: If it is damaged; names the newest sound one beside it.
    """
    check_sound(path)
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    return put_back(checkpoint, shards_of(checkpoint, path)) if SHARDS in checkpoint else checkpoint


def check_sound(path: str | Path, *, every_shard: bool = True) -> None:
    """Hold every byte of a checkpoint against its checksum, and see that it unpickles to tensors and plain data.

    Args:
        path: Of the file.
        every_shard: Of its shards, if it has any, too; else their sizes alone.

    Raises:
        UserError: If not; names the newest sound one beside it.
    """
    if (fault := fault_of(path, every_shard=every_shard)) is None:
        return
    others = [other for other in Path(path).parent.glob("*.ckpt") if not other.samefile(path)]
    for other in sorted(others, key=lambda file: file.stat().st_mtime, reverse=True):
        if fault_of(other) is None:
            raise UserError(f"{path} is damaged ({fault}); the newest sound one beside it: --ckpt_path {other}")
    raise UserError(f"{path} is damaged ({fault}), and no other checkpoint beside it is sound; begin anew")


def fault_of(path: str | Path, *, every_shard: bool = True) -> str | None:
    """What is wrong with a checkpoint, in short; None if it is sound."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself does not look at the checksums
            if (name := archive.testzip()) is not None:
                return f"the checksum of {name} is wrong"
        found = torch.load(path, map_location="meta", weights_only=True)
    except zipfile.BadZipFile:
        return "cut off, or no checkpoint at all"
    except pickle.UnpicklingError:
        return "it holds more than tensors and plain data"
    except (RuntimeError, EOFError, OSError) as error:
        return str(error).splitlines()[0]
    if not isinstance(found, dict) or "state_dict" not in found:
        return "it holds no state_dict"
    return fault_of_shards(shards_of(found, path), every_shard) if SHARDS in found else None


def check_fits(module: LightningModule, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Hold a checkpoint against the module that it is meant for.

    Raises:
        UserError: If it is of another class, or its weights have other names or shapes.
    """
    theirs, ours = checkpoint.get("run", {}).get("module"), class_path(module)
    if theirs is not None and theirs != ours:
        raise UserError(f"{path} is of a {theirs}, not of a {ours}; give a checkpoint of this run")
    saved = shapes(checkpoint)
    wanted = {name: tuple(weight.shape) for name, weight in module.state_dict().items()}
    for name in [*wanted, *saved]:
        if saved.get(name) != wanted.get(name):
            there, here = (str(shapes.get(name, "missing")) for shapes in (saved, wanted))
            raise UserError(
                f"{path} is of another model: {name} is {there} there and {here} here; give its run's settings"
            )


def class_path(module: LightningModule) -> str:
    """The full name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed run was writing when it was killed, and what it had not come to delete."""
    for path in [*folder.glob(f".*{SCRATCH}"), *(folder / SHARDS).glob(f".*{SCRATCH}")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    remove_unused(folder)
