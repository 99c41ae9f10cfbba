"""Runs TRL's own GRPO and RLOO trainers for one iteration of two passes and writes down what they computed."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from tests.peers.cases import TEMPERATURE
from tests.peers.dice import loaded_dice
from tests.peers.group_cases import SIZE, Group, reward
from tests.peers.measure import gradients
from tests.peers.problem import PROMPTS, RESPONSES, WIDTH, network, tokenizer
from tests.peers.trl_offline import QUIET

ROWS = len(RESPONSES["early"])
ROLLOUT = (
    "completion_ids", "completion_mask", "advantages", "old_per_token_logps", "old_logps", "ref_per_token_logps",
)  # fmt: skip


class GradientsOfTheSteps(TrainerCallback):
    """Keeps the gradients that the optimizer is about to use."""

    def __init__(self) -> None:
        self.seen: list[dict[str, list[float]]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(gradients(model))


def run(case: Group, paths: dict[str, str], scratch: Path) -> dict[str, Any]:
    """One iteration: rollout, advantages, two passes."""
    trainers: dict[str, Any] = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
    trainer, config = trainers[case.method]
    made = trainer(
        model=AutoModelForCausalLM.from_pretrained(paths["policy"]),
        reward_funcs=reward,
        args=config(**settings(case, scratch)),
        train_dataset=Dataset.from_list([{"prompt": text} for text in PROMPTS[: ROWS // SIZE]]),
        processing_class=tokenizer(),
    )
    if made.ref_model is not None:  # which it made of the policy; ours is in the middle of a run
        made.ref_model.load_state_dict(network(case.architecture, "reference").state_dict())
    return watched(made)


def settings(case: Group, scratch: Path) -> dict[str, Any]:
    entropy = {"entropy_coef": case.entropy_coef} if case.entropy_coef else {}
    return {
        **QUIET,
        **entropy,
        "output_dir": str(scratch),
        "learning_rate": case.lr,
        "lr_scheduler_type": "constant",
        "max_steps": 2,
        "num_iterations": 2,
        "per_device_train_batch_size": ROWS // case.micro_batches,
        "gradient_accumulation_steps": case.micro_batches,
        "num_generations": SIZE,
        "max_completion_length": WIDTH,
        "temperature": TEMPERATURE,
        "shuffle_dataset": False,
        "beta": case.kl_coef,
        "mask_truncated_completions": case.mask_truncated,
        **case.trl,
    }


def watched(trainer: Any) -> dict[str, Any]:
    """Train for two steps; the rollout, and the losses, batches and gradients of each."""
    rollout: dict[str, Any] = {}
    losses: list[float] = []
    batches: list[dict[str, Any]] = []
    collect, compute, step = trainer._generate_and_score_completions, trainer._compute_loss, trainer.training_step
    callback = GradientsOfTheSteps()

    def note_rollout(inputs: Any) -> Any:
        found = collect(inputs)
        rollout.update({name: found[name].tolist() for name in ROLLOUT if name in found})
        return found

    def note_batch(model: Any, inputs: Any) -> Tensor:
        batches.append(
            {"lengths": inputs["completion_mask"].sum(1).tolist(), "advantages": inputs["advantages"].tolist()}
        )
        return compute(model, inputs)

    def note_loss(*args: Any, **kwargs: Any) -> Tensor:
        loss = step(*args, **kwargs)
        losses.append(float(loss))
        return loss

    trainer._generate_and_score_completions, trainer._compute_loss = note_rollout, note_batch
    trainer.training_step = note_loss
    trainer.add_callback(callback)
    with loaded_dice(RESPONSES["early"]):
        trainer.train()
    half = len(losses) // 2
    logs = trainer.state.log_history[:2]
    return {
        "rollout": rollout,
        "passes": [
            {
                "loss": sum(losses[number * half : (number + 1) * half]),
                "batches": batches[number * half : (number + 1) * half],
                "gradients": callback.seen[number],
                "metrics": {k: v for k, v in logs[number].items() if isinstance(v, float) and k != "step_time"},
            }
            for number in (0, 1)
        ],
    }
