"""Runs our own modules under a Lightning Trainer for the same step and writes down the same things."""

from typing import Any

import lightning.pytorch as pl
import torch
from datasets import Dataset
from lightning.pytorch.loggers import Logger
from torch import Tensor

from rlhf_lightning.data.collate import PreferenceCollator, SequenceCollator
from rlhf_lightning.data.loaders import Placement, make_loader
from rlhf_lightning.losses import BradleyTerryLoss
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import DPOModule, RewardModelModule, SFTModule
from tests.peers.cases import Offline
from tests.peers.measure import gradients
from tests.peers.problem import PAD, encoded, tokenizer


class Memory(Logger):
    """Keeps what is logged."""

    name, version = "memory", "0"

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, float] = {}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Of no interest."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics |= {name.removeprefix("train/"): value for name, value in metrics.items()}


class Watch(pl.Callback):
    """Keeps the batches, the losses that were differentiated, and the gradients that the optimizer was about to use."""

    def __init__(self, network: str) -> None:
        """Args: the attribute under which the module keeps the Hugging Face network's wrapper."""
        self.network = network
        self.input_ids: list[list[list[int]]] = []
        self.loss = 0.0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.input_ids.append(batch.input_ids.tolist())

    def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
        self.loss += float(loss.detach())

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.gradients = gradients(getattr(module, self.network).network)


def sgd(lr: float) -> Any:
    return lambda params: torch.optim.SGD(params, lr=lr)


def run(case: Offline, paths: dict[str, str]) -> dict[str, Any]:
    """One optimizer step of the module that the case names."""
    build = {"sft": sft, "reward": reward}.get(case.method, dpo)
    module, collate, columns, weights = build(case, paths)
    module.tokenizer = tokenizer()
    rows = Dataset.from_dict({**columns, "length": list(range(len(case.pairs)))})  # "by length" keeps the order
    loader = make_loader(
        rows,
        collate,
        batch_size=len(rows) // case.ours_in,
        shuffle=False,
        seed=0,
        place=Placement(accumulate=case.ours_in),
        num_workers=0,
        weights=weights,
        bucket_batches=1,
    )
    outputs: list[Any] = []
    module.register_forward_hook(lambda module, batch, output: outputs.append((*batch, output)))
    watch, memory = Watch("network" if case.method == "reward" else "policy"), Memory()
    fit(module, loader, memory, callbacks=[watch], accumulate_grad_batches=case.ours_in)
    return {
        "input_ids": watch.input_ids,
        "loss": watch.loss,
        "outputs": [value for batch, output in outputs for value in flat(batch, output)],
        "metrics": memory.metrics,
        "gradients": watch.gradients,
        "log_ratios": log_ratios(module, outputs) if case.method == "dpo" else None,
        "means": means(outputs) if case.method == "orpo" else None,
        "entropies": [entropies(*pair) for pair in outputs] if case.method == "sft" else None,
    }


def fit(module: Any, loader: Any, memory: Memory, **settings: Any) -> None:
    pl.Trainer(
        accelerator="cpu",
        logger=memory,
        log_every_n_steps=1,
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        **settings,
    ).fit(module, train_dataloaders=loader)


def sft(case: Offline, paths: dict[str, str]) -> tuple[Any, Any, dict[str, list], list[int]]:
    rows = [encoded(pair) for pair in case.pairs]
    columns = {
        "input_ids": [row["prompt_ids"] + row["chosen_ids"] for row in rows],
        "response_mask": [[0] * len(row["prompt_ids"]) + [1] * len(row["chosen_ids"]) for row in rows],
    }
    module = SFTModule(ModelSpec(path=paths["policy"]), optimizer=sgd(0.0))
    return module, SequenceCollator(PAD), columns, [len(row["chosen_ids"]) for row in rows]


def reward(case: Offline, paths: dict[str, str]) -> tuple[Any, Any, dict[str, list], list[int]]:
    loss = BradleyTerryLoss(**case.loss)
    module = RewardModelModule(ModelSpec(path=paths["reward"]), loss, optimizer=sgd(0.0), normalise=False)
    return module, PreferenceCollator(PAD), pairs(case), [1] * len(case.pairs)


def dpo(case: Offline, paths: dict[str, str]) -> tuple[Any, Any, dict[str, list], list[int]]:
    loss = case.kind(**case.loss)
    policy, reference = ModelSpec(path=paths["policy"]), ModelSpec(path=paths[case.reference])
    module = DPOModule(policy, loss, reference=reference if loss.needs_reference else None, optimizer=sgd(0.0))
    return module, PreferenceCollator(PAD), pairs(case), [1] * len(case.pairs)


def pairs(case: Offline) -> dict[str, list]:
    rows = [encoded(pair, case.end) for pair in case.pairs]
    rows = [{**row, "prompt_ids": [*case.begin, *row["prompt_ids"]]} for row in rows]
    return {key: [row[key] for row in rows] for key in rows[0]}


def flat(batch: Any, output: Any) -> list[float]:
    """Log-probabilities of the supervised tokens row by row, or the scores."""
    if isinstance(output, tuple) and hasattr(output, "logprobs"):
        return output.logprobs[batch.response_mask[:, 1:]].tolist()
    return output.tolist()


def entropies(batch: Any, output: Any) -> list[float]:
    """Of the distributions that predict the supervised tokens of a micro-batch."""
    return output.entropy[batch.response_mask[:, 1:]].tolist()


def means(outputs: list[Any]) -> list[float]:
    """Mean log-probability of a token of each response, chosen first."""
    found = []
    for batch, output in outputs:
        found += (output.logprobs.sum(1) / batch.response_mask.sum(1)).tolist()
    return found


def log_ratios(module: DPOModule, outputs: list[Any]) -> list[tuple[float, int]]:
    """log policy - log reference of each response, chosen first, and how many tokens it has."""
    found = []
    for batch, output in outputs:
        reference = module.reference(batch.input_ids, batch.attention_mask, batch.response_mask)
        ratios = (output.logprobs - reference.logprobs).sum(1).tolist()
        found += list(zip(ratios, batch.response_mask.sum(1).tolist(), strict=True))
    return found
