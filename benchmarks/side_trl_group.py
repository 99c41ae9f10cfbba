"""GRPO and RLOO of TRL 1.16; rollouts by its own ``generate``, whose draws are replaced by the forced ones."""

from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from benchmarks.forced import multinomial_as_told, script_of
from benchmarks.measure import Meter
from benchmarks.problem import KL_COEF, Spec, odd_share, text
from benchmarks.side_trl import compact_head, settings, words


class Watch(TrainerCallback):
    """Tells the meter of iterations; notes the gradient norm that TRL logs of the first one."""

    def __init__(self, meter: Meter, turn: Any, seen: dict[str, float]) -> None:
        self.meter, self.turn, self.seen = meter, turn, seen

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.turn("")
        self.meter.stop()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "grad_norm" in logs:
            self.meter.compare(self.seen["advantage"], logs["grad_norm"])


def run(spec: Spec, meter: Meter) -> None:
    """All iterations, in the setting that the side's name says."""
    if "compact" in spec.side:
        compact_head()
    prompts = [{"prompt": text(row["prompt_ids"])} for row in spec.rows()[:: spec.shape.group]]
    trainer = {"grpo": GRPOTrainer, "rloo": RLOOTrainer}[spec.method](
        model=AutoModelForCausalLM.from_pretrained(spec.policy),
        reward_funcs=odd_share,
        args=config(spec),
        train_dataset=Dataset.from_list(prompts),
        processing_class=words(spec.policy),
    )
    meter.watch(trainer.model.lm_head.weight, trainer.model.model.layers[0].self_attn.q_proj.weight)
    watch(spec, meter, trainer)
    trainer.train()


def config(spec: Spec) -> Any:
    shared = {
        **settings(spec),
        "num_generations": spec.shape.group,
        "max_completion_length": spec.shape.response.most,
        "shuffle_dataset": False,
        "beta": KL_COEF,
    }
    if spec.method == "rloo":
        return RLOOConfig(**shared)
    # Its default multiplies the KL by the ratio, which is another loss than the paper's.
    return GRPOConfig(loss_type="grpo", use_bias_correction_kl=False, **shared)


def watch(spec: Spec, meter: Meter, trainer: Any) -> None:
    """Force the responses, and tell the meter of generation, scoring and update."""
    generate, rollout, collect = trainer.model.generate, trainer._generate, trainer._generate_and_score_completions
    batches, part, seen = iter(spec.batches()), {"name": "", "begun": 0.0}, {"advantage": 0.0}

    def turn(name: str) -> None:
        """From one part of the iteration to the next."""
        if part["name"]:
            meter.leave(part["name"], part["begun"])
        part.update(name=name, begun=meter.enter(name) if name else 0.0)

    def forced(*args: Any, **kwargs: Any) -> torch.Tensor:
        rows = next(batches)
        given = zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)
        assert [ids[real.bool()].tolist() for ids, real in given] == [row["prompt_ids"] for row in rows]
        with multinomial_as_told(script_of(rows)):
            return generate(*args, **kwargs)

    def watched_rollout(*args: Any) -> Any:
        turn("generation")
        drawn = rollout(*args)
        turn("scoring")
        return drawn

    def watched_collect(*args: Any) -> Any:
        found = collect(*args)
        meter.fed(found["prompt_ids"].numel() + found["completion_ids"].numel())
        if not seen["advantage"]:
            seen["advantage"] = float(found["advantages"].abs().mean())
        turn("update")
        return found

    trainer.model.generate = forced
    trainer._generate, trainer._generate_and_score_completions = watched_rollout, watched_collect
    trainer.add_callback(Watch(meter, turn, seen))
