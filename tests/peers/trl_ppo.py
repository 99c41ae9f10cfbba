"""Runs TRL's own PPO trainer for one iteration and writes down the variables of its ``train``."""

import sys
from pathlib import Path
from typing import Any

import numpy
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DataCollatorWithPadding
from trl.experimental.ppo import PPOConfig, PPOTrainer

from tests.peers import cases
from tests.peers.dice import loaded_dice
from tests.peers.measure import gradients
from tests.peers.problem import PROMPTS, RESPONSES, WIDTH, tokenizer

ROLLOUT = (
    "query_responses", "logprobs", "ref_logprobs", "values", "scores", "kl", "rewards", "returns", "advantages",
    "padding_mask", "padding_mask_p1",
)  # fmt: skip
UPDATE = ("micro_batch_inds", "new_logprobs", "vpred", "ratio", "pg_loss", "vf_loss")


class InOrder(DataCollatorWithPadding):
    """Gives the prompts in the order of the script, whichever rows the loader drew."""

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        return super().__call__([{"input_ids": tokenizer()(text)["input_ids"]} for text in PROMPTS])


class Noting(torch.optim.SGD):
    """Plain gradient descent that notes the gradients it is given."""

    def __init__(self, networks: dict[str, Any], lr: float) -> None:
        super().__init__([p for network in networks.values() for p in network.parameters()], lr=lr)
        self.networks = networks
        self.seen: list[dict[str, Any]] = []

    def step(self, closure: Any = None) -> Any:
        self.seen.append({role: gradients(network) for role, network in self.networks.items()})
        return super().step(closure)


def run(case: cases.Online, paths: dict[str, str], scratch: Path) -> dict[str, Any]:
    """One iteration: rollout, advantages, two passes."""
    load = {True: AutoModelForCausalLM, False: AutoModelForSequenceClassification}
    model, reference, reward, critic = (
        load[role in ("policy", "reference")].from_pretrained(paths[role])
        for role in ("policy", "reference", "reward", "critic")
    )
    optimizer = Noting({"policy": model, "critic": critic}, cases.LR)
    rows = [{"input_ids": [0]}] * len(PROMPTS) * (1 if case.last_batch else 2)  # the collator puts the prompts in
    trainer = PPOTrainer(
        args=config(case, scratch),
        processing_class=tokenizer(),
        model=model,
        ref_model=reference,
        reward_model=reward,
        value_model=critic,
        train_dataset=Dataset.from_list(rows),
        data_collator=InOrder(tokenizer()),
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
    )
    return watched(trainer, RESPONSES[case.responses]) | {"gradients": optimizer.seen}


def config(case: cases.Online, scratch: Path) -> PPOConfig:
    return PPOConfig(
        output_dir=str(scratch),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        num_sample_generations=0,
        total_episodes=len(PROMPTS),
        per_device_train_batch_size=len(PROMPTS) // case.micro_batches,
        gradient_accumulation_steps=case.micro_batches,
        num_ppo_epochs=2,
        response_length=WIDTH,
        stop_token="eos",
        temperature=cases.TEMPERATURE,
        kl_coef=cases.KL_COEF,
        missing_eos_penalty=cases.MISSING_EOS_PENALTY,
        cliprange=cases.CLIP,
        cliprange_value=cases.VALUE_CLIP,
        vf_coef=cases.VALUE_COEF,
        lam=case.gae_lambda,
        whiten_rewards=case.whiten_rewards,
        max_grad_norm=1e-3,  # would change every step if the trainer clipped
    )


def watched(trainer: PPOTrainer, responses: list[list[int]]) -> dict[str, Any]:
    """Train, and at every backward read the local variables of ``PPOTrainer.train``."""
    rollout: dict[str, Any] = {}
    updates: list[dict[str, Any]] = []
    metrics: dict[str, float] = {}
    backward, log = trainer.accelerator.backward, trainer.log

    def note(loss: Tensor, **kwargs: Any) -> None:
        variables = sys._getframe(1).f_locals
        assert variables["self"] is trainer
        rollout.update({name: written(variables[name]) for name in ROLLOUT})
        logits = variables["logits"].detach()
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        updates.append({name: written(variables[name]) for name in UPDATE} | {"entropy": written(entropy)})
        backward(loss, **kwargs)

    def keep(logs: dict[str, float], *args: Any) -> None:
        metrics.update({name: value for name, value in logs.items() if name != "eps"})  # a speed
        log(logs, *args)

    trainer.accelerator.backward, trainer.log = note, keep
    numpy.random.seed(1)  # shuffles the micro-batches; `args.seed` does not reach it
    with loaded_dice(responses):
        trainer.train()
    return {"rollout": rollout, "updates": updates, "metrics": metrics}


def written(x: Any) -> Any:
    return x.tolist()
