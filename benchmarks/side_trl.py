"""TRL's own trainers, stock but tuned: no gradient checkpointing, bf16 off for float32; and its best settings."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from benchmarks.measure import Meter
from benchmarks.problem import DPO_BETA, LR, MAX_GRAD_NORM, Spec, text


class Watch(TrainerCallback):
    """Tells the meter of steps; the first one's loss and gradient norm are those that TRL logs."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.stop()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.meter.compare(logs["loss"], logs["grad_norm"])


def run(spec: Spec, meter: Meter) -> None:
    """All steps of the method, in the setting that the side's name says."""
    if "compact" in spec.side:
        compact_head()
    trainer = {"sft": sft, "reward": reward, "dpo": dpo, "kto": kto}[spec.method](spec)
    model, step = trainer.model, trainer.training_step
    head = model.lm_head.weight if spec.method != "reward" else None
    meter.watch(head, model.model.layers[0].self_attn.q_proj.weight)

    def training_step(model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        meter.fed(sum(batch[name].numel() for name in ("input_ids", "KL_input_ids") if name in batch))
        return step(model, batch, *args, **kwargs)

    trainer.training_step = training_step
    trainer.add_callback(Watch(meter))
    trainer.train()


def compact_head() -> None:
    """Switch on what TRL does on CUDA and XPU alone: score the labelled positions only."""
    from trl.trainer import utils

    utils._use_triton = lambda device: True


def settings(spec: Spec) -> dict[str, Any]:
    return {
        "output_dir": str(Path(spec.folder, "trl")),
        "use_cpu": True,
        "bf16": spec.precision == "bf16",
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 10,
        "logging_first_step": True,
        "max_steps": spec.warmup + spec.steps,
        "learning_rate": LR,
        "weight_decay": 0.0,
        "max_grad_norm": MAX_GRAD_NORM,
        "per_device_train_batch_size": spec.batch_size,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
    }


def sft(spec: Spec) -> SFTTrainer:
    rows = [
        {
            "input_ids": row["prompt_ids"] + row["chosen_ids"],
            "completion_mask": [0] * len(row["prompt_ids"]) + [1] * len(row["chosen_ids"]),
        }
        for row in spec.rows()
    ]
    flat = {"padding_free": True, "max_length": None} if "padding-free" in spec.side else {}
    args = SFTConfig(completion_only_loss=True, **flat, **settings(spec))
    model = AutoModelForCausalLM.from_pretrained(spec.policy)
    return SFTTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=words(spec.policy))


def reward(spec: Spec) -> RewardTrainer:
    names = ("chosen_ids", "rejected_ids")
    rows = [{name: row["prompt_ids"] + row[name] for name in names} for row in spec.rows()]
    model = AutoModelForSequenceClassification.from_pretrained(spec.scalar, num_labels=1)
    args = RewardConfig(**settings(spec))
    return RewardTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=words(spec.scalar))


def dpo(spec: Spec) -> DPOTrainer:
    """From text, for TRL takes no ids here; its tokenizer makes the same ids of it."""
    rows = [{name: text(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")} for row in spec.rows()]
    rows = [{"prompt": row["prompt"], **{side: f" {row[side]}" for side in ("chosen", "rejected")}} for row in rows]
    model, reference = (AutoModelForCausalLM.from_pretrained(path) for path in (spec.policy, spec.reference))
    args = DPOConfig(beta=DPO_BETA, **settings(spec))
    tokenizer = words(spec.policy)
    return DPOTrainer(model, reference, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def kto(spec: Spec) -> KTOTrainer:
    """The chosen of a batch are liked; behind them come its rejected, so that no prompt meets another answer of its own."""
    halves = [(row, f"{side}_ids") for batch in spec.batches() for side in ("chosen", "rejected") for row in batch]
    rows = [
        {"prompt": text(row["prompt_ids"]), "completion": f" {text(row[name])}", "label": name == "chosen_ids"}
        for row, name in halves
    ]
    model, reference = (AutoModelForCausalLM.from_pretrained(path) for path in (spec.policy, spec.reference))
    given = settings(spec) | {"per_device_train_batch_size": 2 * spec.batch_size}
    args, tokenizer = KTOConfig(beta=DPO_BETA, **given), words(spec.policy)
    return KTOTrainer(model, reference, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def words(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(folder)
