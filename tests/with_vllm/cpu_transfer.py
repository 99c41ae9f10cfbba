"""A weight-transfer engine for vLLM that needs no GPU: tensors as bytes, through the calls that ``ipc`` and ``nccl`` make."""

import base64
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from safetensors.torch import load, save
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlhf_lightning.generation.vllm_weights import Sender, WeightTransfer
from rlhf_lightning.generation.vllm_worker import WorkerExtension

BACKEND = "cpu_bytes"


class Registered(WorkerExtension):
    """``worker_extension_cls``: importing it makes the engine known where the weights arrive."""


@dataclass
class Init(WeightTransferInitInfo):
    """Nothing has to be agreed upon."""


@dataclass
class Update(WeightTransferUpdateInfo):
    names: list[str]
    data: str


@dataclass
class TrainerInit(TrainerInitInfo):
    backend: ClassVar[str] = BACKEND


class Worker(WeightTransferEngine):
    init_info_cls, update_info_cls = Init, Update

    def init_transfer_engine(self, init_info):
        self.met = True

    def start_weight_update(self):
        assert self.met
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self):
        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info):
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info):
        weights = load(base64.b64decode(update_info.data))
        assert set(weights) == set(update_info.names)
        self.model.load_weights([(name, weights[name]) for name in update_info.names])

    def shutdown(self):
        self.met = False


class Trainer(TrainerWeightTransferEngine):
    init_info_cls = TrainerInit

    @classmethod
    def trainer_init(cls, init_info, *, client, source=None):
        client.init_weight_transfer_engine({})
        return cls(client=client, source=source, is_sender=init_info.is_sender)

    def send_weights(self):
        told = [(each.name, each.dtype, each.shape) for each in self.source.metadata()]
        given = dict(self.source)
        assert told == [(name, weight.dtype, tuple(weight.shape)) for name, weight in given.items()]
        self.client.start_weight_update()
        for part in (list(given)[::2], list(given)[1::2]):  # in pieces, as large models come
            data = base64.b64encode(save({name: given[name].clone() for name in part})).decode()
            self.client.update_weights(asdict(Update(part, data)))
        self.client.finish_weight_update()


class Bytes(WeightTransfer):
    """As CudaIPC and NCCL are, but for the type of what starts it."""

    backend = BACKEND

    def __init__(self):
        self.sender = Sender()

    @torch.no_grad()
    def send(self, network, weights, receiver):
        if not self.sender.ready:
            self.sender.meet(TrainerInit(rank=0), receiver)
        self.sender.send(weights)


WeightTransferEngineFactory.register_engine(BACKEND, Worker)
WeightTransferTrainerFactory.register_engine(BACKEND, Trainer)
