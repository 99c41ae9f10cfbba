"""Runs TRL's own SFT, reward, DPO, CPO and ORPO trainers for one optimizer step and writes down what they computed."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from tests.peers.cases import Offline
from tests.peers.measure import gradients
from tests.peers.problem import encoded, tokenizer, tokenizer_padding_with

QUIET = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "max_steps": 1,
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "train_sampling_strategy": "sequential",
    "dataloader_pin_memory": False,
}


class GradientsOfTheStep(TrainerCallback):
    """Keeps the gradients that the optimizer is about to use."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen = gradients(model)


def run(case: Offline, paths: dict[str, str], scratch: Path) -> dict[str, Any]:
    """One step of the trainer that the case names."""
    rows = len(case.pairs)
    settings = {
        **QUIET,
        "output_dir": str(scratch),
        "per_device_train_batch_size": rows // case.micro_batches,
        "gradient_accumulation_steps": case.micro_batches,
        **case.trl,
    }
    methods = {"sft": sft, "reward": reward, "dpo": dpo, "cpo": without_reference, "orpo": without_reference}
    trainer = methods[case.method](case, paths, settings)
    return watched(trainer)


def sft(case: Offline, paths: dict[str, str], settings: dict[str, Any]) -> SFTTrainer:
    rows = [encoded(pair) for pair in case.pairs]
    data = [
        {
            "input_ids": row["prompt_ids"] + row["chosen_ids"],
            "completion_mask": [0] * len(row["prompt_ids"]) + [1] * len(row["chosen_ids"]),
        }
        for row in rows
    ]
    model = AutoModelForCausalLM.from_pretrained(paths["policy"])
    args = SFTConfig(completion_only_loss=True, **settings)
    return SFTTrainer(model, args=args, train_dataset=Dataset.from_list(data), processing_class=tokenizer())


def reward(case: Offline, paths: dict[str, str], settings: dict[str, Any]) -> RewardTrainer:
    rows = [encoded(pair) for pair in case.pairs]
    data = [
        {
            "chosen_ids": row["prompt_ids"] + row["chosen_ids"],
            "rejected_ids": row["prompt_ids"] + row["rejected_ids"],
            "margin": row["margin"],
        }
        for row in rows
    ]
    model = AutoModelForSequenceClassification.from_pretrained(paths["reward"], num_labels=1)
    padding = tokenizer_padding_with(case.pad)
    return RewardTrainer(
        model, args=RewardConfig(**settings), train_dataset=Dataset.from_list(data), processing_class=padding
    )


def dpo(case: Offline, paths: dict[str, str], settings: dict[str, Any]) -> DPOTrainer:
    """From text: TRL tokenizes, and puts the EOS, itself."""
    data = [{key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in case.pairs]
    model, reference = (AutoModelForCausalLM.from_pretrained(paths[role]) for role in ("policy", case.reference))
    return DPOTrainer(
        model,
        reference,
        args=DPOConfig(**settings),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer(),
    )


def without_reference(case: Offline, paths: dict[str, str], settings: dict[str, Any]) -> CPOTrainer | ORPOTrainer:
    data = [{key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in case.pairs]
    config, trainer = {"cpo": (CPOConfig, CPOTrainer), "orpo": (ORPOConfig, ORPOTrainer)}[case.method]
    return trainer(
        AutoModelForCausalLM.from_pretrained(paths["policy"]),
        args=config(remove_unused_columns=False, **settings),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer(),
    )


def watched(trainer: Any) -> dict[str, Any]:
    """Train for one step; what went in and came out of every micro-batch, and the gradients of the step."""
    inputs: list[list[list[int]]] = []
    losses: list[float] = []
    outputs: list[float] = []
    step, callback = trainer.training_step, GradientsOfTheStep()

    def training_step(model: Any, batch: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        sides = ("input_ids",) if "input_ids" in batch else ("chosen_input_ids", "rejected_input_ids")
        inputs.append([row for side in sides for row in batch[side].tolist()])
        loss = step(model, batch, *args, **kwargs)
        losses.append(float(loss))
        return loss

    def after_forward(model: Any, args: Any, kwargs: Any, output: Any) -> None:
        if output.get("log_probs") is not None:
            width = kwargs["labels"].shape[1] - 1
            outputs.extend(output.log_probs[:, :width][kwargs["labels"][:, 1:] != -100].tolist())
        elif output.logits.dim() == 2:  # scores; the logits of a whole vocabulary are too many to write down
            outputs.extend(output.logits.flatten().tolist())

    trainer.training_step = training_step
    trainer.model.register_forward_hook(after_forward, with_kwargs=True)
    trainer.add_callback(callback)
    trainer.train()
    return {
        "input_ids": inputs,
        "loss": sum(losses),
        "outputs": outputs,
        "metrics": {k: v for k, v in trainer.state.log_history[0].items() if isinstance(v, float)},
        "gradients": callback.seen,
    }
