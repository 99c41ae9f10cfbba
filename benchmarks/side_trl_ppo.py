"""PPO of TRL 1.12, the last that has it; rollouts by its own ``generate``, whose draws are replaced by the forced ones."""

import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.forced import multinomial_as_told, script_of
from benchmarks.measure import Meter
from benchmarks.problem import KL_COEF, LR, PAD, Spec


class StepEnds(TrainerCallback):
    """Tells the meter that an iteration, its log included, is over."""

    def __init__(self, stop: Any) -> None:
        self.stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()


def run(spec: Spec, meter: Meter) -> None:
    """All iterations."""
    if (
        spec.precision == "bf16"
    ):  # as `accelerate launch --mixed_precision bf16`: its trainer's own flag does not reach it
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    model, reference = (AutoModelForCausalLM.from_pretrained(spec.policy) for _ in range(2))
    critic, judge = (AutoModelForSequenceClassification.from_pretrained(spec.scalar, num_labels=1) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(spec.policy)
    meter.watch(model.lm_head.weight, model.model.layers[0].self_attn.q_proj.weight)
    trainer = PPOTrainer(
        args=config(spec),
        processing_class=tokenizer,
        model=model,
        ref_model=reference,
        reward_model=judge,
        value_model=critic,
        train_dataset=Dataset.from_list([{"input_ids": row["prompt_ids"]} for row in spec.rows()]),
    )
    # Its loader shuffles; every side takes the rows in one order.
    loader = torch.utils.data.DataLoader(trainer.train_dataset, spec.batch_size, collate_fn=trainer.data_collator)
    trainer.dataloader = trainer.accelerator.prepare(loader)
    watch(spec, meter, trainer)
    trainer.train()


def config(spec: Spec) -> PPOConfig:
    return PPOConfig(
        output_dir=str(Path(spec.folder, "trl")),
        use_cpu=True,
        bf16=spec.precision == "bf16",
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=10,
        num_sample_generations=0,
        total_episodes=spec.batch_size * (spec.warmup + spec.steps),
        per_device_train_batch_size=spec.batch_size,
        gradient_accumulation_steps=1,
        num_ppo_epochs=spec.shape.epochs,
        response_length=spec.shape.response.most,
        stop_token="eos",
        temperature=1.0,
        learning_rate=LR,
        weight_decay=0.0,
        kl_coef=KL_COEF,
        lam=1.0,
        missing_eos_penalty=1.0,
        whiten_rewards=False,
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=0.1,
    )


def watch(spec: Spec, meter: Meter, trainer: PPOTrainer) -> None:
    """Force the responses, and tell the meter of generation, scoring and update."""
    draw, forward, backward = ppo_trainer.batch_generation, ppo_trainer.forward, trainer.accelerator.backward
    rows = {tuple(row["prompt_ids"]): row for row in spec.rows()}
    part: dict[str, Any] = {"name": "", "begun": 0.0}

    def turn(name: str) -> None:
        """From one part of the iteration to the next."""
        if part["name"]:
            meter.leave(part["name"], part["begun"])
        part.update(name=name, begun=meter.enter(name) if name else 0.0)

    def generation(model: Any, queries: torch.Tensor, *args: Any) -> Any:
        meter.start()
        turn("generation")
        asked = [rows[tuple(query[query != PAD].tolist())] for query in queries]
        with multinomial_as_told(script_of(asked, spec.shape.response.most)):
            drawn = draw(model, queries, *args)
        meter.fed(drawn[0].numel())
        turn("scoring")
        return drawn

    def watched_forward(model: Any, *args: Any) -> Any:
        if part["name"] == "scoring" and model is trainer.model:
            turn("update")
        return forward(model, *args)

    def noting_backward(loss: torch.Tensor, **kwargs: Any) -> None:
        backward(loss, **kwargs)
        if meter.done == 0:
            grads = [p.grad for p in trainer.policy_model.parameters() if p.grad is not None]
            meter.compare(value_loss(sys._getframe(1).f_locals), float(torch.nn.utils.get_total_norm(grads)))

    def stop() -> None:
        turn("")
        meter.stop()

    ppo_trainer.batch_generation, ppo_trainer.forward = generation, watched_forward
    trainer.accelerator.backward = noting_backward
    trainer.add_callback(StepEnds(stop))


def value_loss(variables: dict[str, Any]) -> float:
    """TRL's value loss of the response tokens; its own mean has one slot more in every response that ends early."""
    counted = ~variables["padding_mask"][variables["micro_batch_inds"]]
    loss = float(0.5 * variables["vf_loss_max"][counted].mean())
    assert not math.isnan(loss)
    return loss
