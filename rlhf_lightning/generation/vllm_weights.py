"""How the policy's weights reach vLLM, and how it is known that they have."""

import importlib.util
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.export import Writing
from rlhf_lightning.models.loading import embedding_weight
from rlhf_lightning.models.merging import plain_weights, skeleton

PROBE = 16  # tokens
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # nats a token, on average


class Receiver(Protocol):
    """The side that generates. All but ``reload`` is what vLLM's own senders ask of it."""

    def reload(self, folder: str) -> None:
        """Take all weights from a Hugging Face folder."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Any) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


class WeightTransfer(ABC):
    """The way that new weights take."""

    @property
    def backend(self) -> str | None:
        """Which of vLLM's weight-transfer engines the receiving side must be started with; None for none."""
        return None

    @abstractmethod
    def send(self, network: PreTrainedModel, weights: dict[str, Tensor], receiver: Receiver) -> None:
        """Hand all weights over, and return when they are in use.

        Args:
            network: The policy.
            weights: Its weights, whole and with its adapter merged in, by the names of a plain transformers model.
            receiver: Who takes them.
        """


class Files(WeightTransfer):
    """Through a folder: works on every device, and with a server that sees the same files."""

    def __init__(self, folder: str | None = None) -> None:
        """Remember where.

        Args:
            folder: Where the weights are written for the moment that the other side reads them; one in memory such as
                /dev/shm is fastest, a server on another node needs a shared one. None: the system's temporary folder.
        """
        self.folder = folder

    def send(self, network: PreTrainedModel, weights: dict[str, Tensor], receiver: Receiver) -> None:
        with tempfile.TemporaryDirectory(prefix="vllm-weights-", dir=self.folder) as folder:
            write_model(network, weights, folder)
            receiver.reload(folder)


class CudaIPC(WeightTransfer):
    """From memory to memory of one GPU, through vLLM's ``ipc`` engine: for a policy on the very GPU that generates."""

    backend = "ipc"

    def __init__(self) -> None:
        needs_vllm("CudaIPC")
        self.sender = Sender()

    def send(self, network: PreTrainedModel, weights: dict[str, Tensor], receiver: Receiver) -> None:
        on_gpu("CudaIPC", network)
        if not self.sender.ready:
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            self.sender.meet(IPCTrainerInitInfo(rank=0, packed=True), receiver)
        self.sender.send(weights)


class NCCL(WeightTransfer):
    """Broadcast to the GPUs of a server on this or another node, through vLLM's ``nccl`` engine."""

    backend = "nccl"

    def __init__(self, address: str, port: int = 29600, workers: int = 1) -> None:
        """Remember where the two meet.

        Args:
            address: Of the node with the first rank of this run, as the server sees it.
            port: A free one there.
            workers: GPUs that the server runs on.

        Raises:
            UserError: If vLLM, whose sender this is, is not installed on this side.
        """
        needs_vllm("NCCL")
        self.address, self.port, self.workers = address, port, workers
        self.sender = Sender()

    def send(self, network: PreTrainedModel, weights: dict[str, Tensor], receiver: Receiver) -> None:
        on_gpu("NCCL", network)
        if not self.sender.ready:
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            self.sender.meet(NCCLTrainerInitInfo(self.address, self.port, 1 + self.workers, rank=0), receiver)
        self.sender.send(weights)


class Tensors(NamedTuple):
    """What vLLM's senders want to know of a weight before it comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Sender:
    """One of vLLM's trainer-side engines, and the weights that it is to send next."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.engine: Any = None

    @property
    def ready(self) -> bool:
        """Whether the two sides have met."""
        return self.engine is not None

    def meet(self, init_info: Any, receiver: Receiver) -> None:
        """Find the other side; vLLM picks the engine by the type of ``init_info``."""
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        self.engine = WeightTransferTrainerFactory.trainer_init(init_info, client=receiver, source=self)

    def send(self, weights: dict[str, Tensor]) -> None:
        """Send them all; none is kept."""
        self.weights = {name: weight.contiguous() for name, weight in weights.items()}
        self.engine.send_weights()
        self.weights = {}

    def metadata(self) -> list[Tensors]:
        """Asked by vLLM's engine before it iterates."""
        return [Tensors(name, weight.dtype, tuple(weight.shape)) for name, weight in self.weights.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.weights.items())


def on_gpu(who: str, network: PreTrainedModel) -> None:
    """Refuse weights that are in no GPU's memory.

    Raises:
        UserError: Names the way that they can take.
    """
    if network.device.type != "cuda":
        raise UserError(
            f"{who} sends from the memory of a GPU, the policy is on {network.device}; leave transfer to Files"
        )


def needs_vllm(who: str) -> None:
    """Make sure of the extra before anything is computed.

    Raises:
        UserError: If it is not installed.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:  # a folder of that name is no package
        raise UserError(
            f"{who} needs vLLM, which is not installed: pip install 'rlhf_lightning[vllm]' on a machine with a GPU; where there"
            " is none, `make vllm` makes an environment for it, .venv-vllm"
        )


def write_model(network: PreTrainedModel, weights: dict[str, Tensor], folder: str) -> None:
    """Config and weights as a Hugging Face folder, without tokenizer.

    Raises:
        UserError: If the disk is full.
    """
    plain: Any = skeleton(network)
    plain.should_save_on_this_rank = lambda is_main_process: (
        True
    )  # each rank has a vLLM of its own; transformers writes one
    with Writing(Path(folder)):
        plain.save_pretrained(folder, state_dict=weights)


def probe(network: PreTrainedModel) -> list[int]:
    """A few tokens from all over the vocabulary, whose log-probabilities tell one set of weights from another."""
    length = min(PROBE, getattr(network.config, "max_position_embeddings", PROBE) - 1)
    return torch.linspace(0, len(embedding_weight(network)) - 1, length).long().tolist()


@torch.no_grad()
def probe_logprobs(network: PreTrainedModel) -> Tensor:
    """What the policy, in its own precision, says of each token of the probe but the first. Shape (probe - 1,), nats."""
    ids = torch.tensor([probe(network)], device=network.device)
    with torch.autocast(ids.device.type, enabled=False):
        logits = network(input_ids=ids, use_cache=False).logits
    return logits[0, :-1].float().log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1).cpu()


def check_probe(policys: Tensor, engines: list[float], tolerance: float, who: str) -> None:
    """Hold what the engine says of the probe against the policy.

    Args:
        policys: From :func:`probe_logprobs`.
        engines: The same, of the engine.
        tolerance: Largest mean difference, nats.
        who: Names the engine.

    Raises:
        UserError: If they differ by more.
    """
    apart = float((torch.tensor(engines) - policys).abs().mean())
    if not apart <= tolerance:
        raise UserError(
            f"{who} does not compute with the policy's weights: on a probe their log-probabilities differ by {apart:.2g} nats a"
            f" token, {tolerance:.2g} are tolerated; the weights did not arrive, or someone else's did, or it computes in"
            " another precision"
        )


def has_tied_head(network: PreTrainedModel) -> bool:
    """Whether the weights of head and embedding are one."""
    return network.get_output_embeddings().weight is embedding_weight(network)


def whole_weights(network: PreTrainedModel, keep: bool = True) -> dict[str, Tensor]:
    """The policy as plain weights; where it is in shards every rank must call, and those that keep nothing get nothing."""
    with torch.no_grad():
        return plain_weights(network, keep)
