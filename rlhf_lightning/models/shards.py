"""Tensors in a folder with a file a rank (``torch.distributed.checkpoint``), which any number of ranks reads back."""

import pickle
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

SHARDS = "shards"  # of a checkpoint's tensors, in a folder beside it; and the key under which it says so
WEIGHTS, OPTIMIZERS = (
    "state_dict/",
    "optimizer_states/",
)  # how names begin: state_dict/NAME, optimizer_states/0/INDEX/NAME
INDEX = ".metadata"
CHUNK = 1 << 24  # bytes read at a time
KNOWN = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("Path", "PosixPath", "WindowsPath"),
}  # fmt: skip


class PlainUnpickler(pickle.Unpickler):
    """Knows what an index of tensors is made of, and nothing that could be made to run."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of that name.

        Raises:
            pickle.UnpicklingError: If an index of tensors has no use for it.
        """
        kind = isinstance(getattr(torch, name, None), torch.dtype) or name == "Size"
        if name not in KNOWN.get(module, ()) and not (module == "torch" and kind):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in the index of a checkpoint")
        return super().find_class(module, name)


class PlainReader(dcp.FileSystemReader):
    """torch's own reader, but for the index, which it would unpickle whatever it holds."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / INDEX).open("rb") as file:
            return PlainUnpickler(file).load()


@dataclass(frozen=True)
class Shards:
    """A folder of tensors, and what its files have to look like.

    Attributes:
        folder: Where they are.
        files: Bytes and CRC-32 of each file, by name.
        ties: Names of weights that are another one again, with the name under which that is there.
    """

    folder: Path
    files: dict[str, tuple[int, int]]
    ties: dict[str, str]

    def fault(self, names: Iterable[str] | None = None, *, every_byte: bool = True) -> str | None:
        """What is wrong with the files, in short; None if they are sound.

        Args:
            names: Of the files to look at; None for all.
            every_byte: Hold the content against its checksum, too, and not the size alone; of the index in any case.
        """
        for name in self.files if names is None else names:
            path, (size, checksum) = self.folder / name, self.files[name]
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != size:
                return f"{path} has {path.stat().st_size} bytes, not {size}"
            if (every_byte or name == INDEX) and checksum_of(path) != checksum:
                return f"the checksum of {path} is wrong"
        return None

    def index(self) -> dict[str, TensorStorageMetadata]:
        """Shape and dtype of each tensor, by name."""
        return PlainReader(self.folder).read_metadata().state_dict_metadata  # type: ignore[return-value]

    def read(self, tensors: dict[str, Tensor], *, alone: bool = False) -> None:
        """Fill tensors, which may be in shards themselves, however many ranks there are now or were then.

        Args:
            tensors: By name; changed in place.
            alone: By this process alone; else every rank must call with the same names.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, storage_reader=PlainReader(self.folder), no_dist=alone)

    def whole(self) -> dict[str, Tensor]:
        """All tensors, by this process alone."""
        tensors = {name: torch.empty(part.size, dtype=part.properties.dtype) for name, part in self.index().items()}
        self.read(tensors, alone=True)
        return tensors


def write_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write each rank's part of the tensors; every rank must call.

    Args:
        tensors: By name; where they are whole, one of the ranks writes them.
        folder: On a file system that all ranks share; made if it is not there.

    Raises:
        CheckpointException: On all ranks, if one of them can't write.
    """
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder))


def files_of_rank(folder: Path) -> dict[str, tuple[int, int]]:
    """Bytes and CRC-32 of what this rank has written."""
    rank = dist.get_rank()
    own = [*folder.glob(f"__{rank}_*.distcp"), *([folder / INDEX] if rank == 0 else [])]
    return {path.name: (path.stat().st_size, checksum_of(path)) for path in sorted(own)}


def checksum_of(path: Path) -> int:
    """CRC-32 of a file."""
    checksum = 0
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            checksum = zlib.crc32(data, checksum)
    return checksum
