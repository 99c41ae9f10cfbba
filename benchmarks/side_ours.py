"""rlhf_lightning itself: its module, its collators and samplers' plans, a Lightning Trainer, metrics.csv every tenth step."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import lightning.pytorch as pl
import torch
from datasets import Dataset
from torch import Tensor

from benchmarks.forced import script_of
from benchmarks.measure import Meter
from benchmarks.problem import (
    DPO_BETA,
    GROUPED,
    KL_COEF,
    LR,
    MAX_GRAD_NORM,
    ONLINE,
    Spec,
    odd_share,
    text,
)
from rlhf_lightning.batches import UnpairedBatch
from rlhf_lightning.callbacks.metrics_file import RunMetrics
from rlhf_lightning.data.collate import (
    PlannedRows,
    PreferenceCollator,
    PromptCollator,
    SequenceCollator,
    UnpairedCollator,
)
from rlhf_lightning.data.loaders import RowLoader
from rlhf_lightning.data.sampler import BatchPlan
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.generation.native import NativeEngine
from rlhf_lightning.losses import BradleyTerryLoss, DPOLoss, KTOLoss, PolicyObjective, PPOLoss, SequenceClippedLoss
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import DPOModule, GRPOModule, KTOModule, PPOModule, RewardModelModule, SFTModule
from rlhf_lightning.modules.grpo_update import Groups, GRPOUpdate
from rlhf_lightning.modules.handoff import ready_tokenizer
from rlhf_lightning.modules.ppo_update import PPOUpdate
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.rewards.reward_model import RewardModelReward
from rlhf_lightning.rollouts.advantages import GAE
from rlhf_lightning.rollouts.buffer import Rollout
from rlhf_lightning.rollouts.group_advantages import CriticFree, GroupMean, LeaveOneOut
from rlhf_lightning.rollouts.kl_control import FixedKL

PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "bf16-true": "bf16-true"}


def run(spec: Spec, meter: Meter) -> None:
    """All steps of the method."""
    build = {"sft": sft, "reward": reward, "dpo": dpo, "kto": kto, "ppo": ppo, "grpo": grpo, "rloo": rloo}[spec.method]
    module = build(spec, meter)
    trainer = pl.Trainer(
        accelerator="cpu" if spec.device == "cpu" else "gpu",
        devices=spec.ranks,
        strategy="ddp" if spec.ranks > 1 else "auto",
        precision=PRECISIONS[spec.precision],
        max_epochs=1,
        gradient_clip_val=None if spec.method in ONLINE else MAX_GRAD_NORM,
        logger=RunMetrics(spec.folder),
        log_every_n_steps=10,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        callbacks=[Watch(meter)],
    )
    trainer.fit(module, datamodule=FixedRows(spec))


def model_spec(spec: Spec, folder: str) -> ModelSpec:
    return ModelSpec(path=folder, dtype="bfloat16" if spec.precision == "bf16-true" else "float32")


def learning_rate(spec: Spec) -> float:
    """That of all sides; a larger one for bfloat16 weights, which a small one would not move, so that it is refused."""
    return 1e-4 if spec.precision == "bf16-true" else LR


def adamw(spec: Spec) -> Callable[[Any], torch.optim.Optimizer]:
    """Fused, as TRL's; but Lightning's bf16-mixed does not let gradients be clipped for a fused optimizer."""
    return lambda params: torch.optim.AdamW(
        params, lr=learning_rate(spec), weight_decay=0.0, fused=spec.precision != "bf16"
    )


# ---------------------------------------------------------------- data


class FixedRows(pl.LightningDataModule):
    """Rows that are token ids already, in the order in which every side takes them; our collators make our batches."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        # A group is drawn to one prompt, which stands in the batch once.
        self.again = spec.shape.group if spec.method in GROUPED else 1
        self.batch_size = spec.batch_size // self.again

    def setup(self, stage: str) -> None:
        self.tokenizer = ready_tokenizer(self.spec.policy)

    def train_dataloader(self) -> RowLoader:
        collators = {"sft": SequenceCollator, "reward": PreferenceCollator, "dpo": PreferenceCollator, "kto": Halves}
        collate = collators.get(self.spec.method, PromptCollator)(self.tokenizer.pad_token_id)
        rows = [columns(self.spec.method, row) for row in self.spec.rows()[:: self.again]]
        weights = [sum(row.get("response_mask", [1])) for row in rows]
        numbers = list(range(len(rows)))
        batches = [numbers[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        # What our sampler plans: this rank's rows, and the mean weight of a rank's batch.
        trainer: Any = self.trainer
        rank, ranks = trainer.global_rank, trainer.world_size
        plans = [BatchPlan(batch[rank::ranks], sum(weights[row] for row in batch) / ranks) for batch in batches]
        planned: Any = PlannedRows(Dataset.from_list(rows))
        return RowLoader(planned, batch_sampler=plans, collate_fn=collate)  # type: ignore[arg-type]


class Halves:
    """Pairs as liked and disliked completions, the liked ones of a batch first."""

    def __init__(self, pad_id: int) -> None:
        self.collate = UnpairedCollator(pad_id, max_length=10**6)

    def __call__(self, planned: tuple[dict[str, list[Any]], float]) -> UnpairedBatch:
        pairs, number = planned
        prompts, answers = pairs["prompt_ids"] * 2, pairs["chosen_ids"] + pairs["rejected_ids"]
        labels = [row < len(prompts) // 2 for row in range(len(prompts))]
        return self.collate(({"prompt_ids": prompts, "completion_ids": answers, "label": labels}, 2 * number))


def columns(method: str, row: dict[str, list[int]]) -> dict[str, Any]:
    """What our collator for the method reads."""
    prompt, chosen = row["prompt_ids"], row["chosen_ids"]
    if method == "sft":
        return {"input_ids": prompt + chosen, "response_mask": [0] * len(prompt) + [1] * len(chosen)}
    return {"prompt_ids": prompt, "prompt": text(prompt)} if method in ONLINE else {**row, "margin": 0.0}


# ---------------------------------------------------------------- modules


class Watch(pl.Callback):
    """Tells the meter of steps, and of the first one's loss and gradient norm."""

    def __init__(self, meter: Meter) -> None:
        self.meter, self.loss = meter, 0.0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        method = self.meter.spec.method
        wrapped = {"reward": "network", "ppo": "actor_critic.policy"}.get(method, "policy")
        network = attrgetter(wrapped)(module).network
        head = None if method == "reward" else network.lm_head.weight
        self.meter.watch(head, network.base_model.layers[0].self_attn.q_proj.weight)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if self.meter.spec.method not in ONLINE:
            self.meter.fed(batch.input_ids.numel())
        self.meter.start()

    def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
        if self.meter.done == 0:
            self.loss = float(loss.detach())

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if self.meter.done == 0 and self.meter.spec.method not in ONLINE:
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            self.meter.compare(self.loss, float(torch.nn.utils.get_total_norm(grads)))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.meter.stop()


def sft(spec: Spec, meter: Meter) -> SFTModule:
    return SFTModule(model_spec(spec, spec.policy), optimizer=adamw(spec))


def reward(spec: Spec, meter: Meter) -> RewardModelModule:
    loss = BradleyTerryLoss(centering_coef=0.0)
    return RewardModelModule(model_spec(spec, spec.scalar), loss, optimizer=adamw(spec), normalise=False)


def dpo(spec: Spec, meter: Meter) -> DPOModule:
    reference = model_spec(spec, spec.reference)
    return DPOModule(model_spec(spec, spec.policy), DPOLoss(beta=DPO_BETA), reference=reference, optimizer=adamw(spec))


def kto(spec: Spec, meter: Meter) -> KTOModule:
    reference = model_spec(spec, spec.reference)
    return KTOModule(model_spec(spec, spec.policy), KTOLoss(beta=DPO_BETA), reference=reference, optimizer=adamw(spec))


def ppo(spec: Spec, meter: Meter) -> PPOModule:
    size, engine = spec.shape, Forced(spec)
    loss, optimizer = first_step(meter)
    module = PPOModule(
        model_spec(spec, spec.policy),
        model_spec(spec, spec.scalar),
        RewardModelReward(spec.scalar, dtype="bfloat16" if spec.precision == "bf16-true" else "float32"),
        kl=FixedKL(KL_COEF),
        sampling=SamplingParameters(max_new_tokens=size.response.most, engine=engine),
        loss=loss,
        advantages=GAE(gae_lambda=1.0),
        update=PPOUpdate(
            epochs=size.epochs,
            minibatch_size=size.rollouts,
            micro_batch_size=size.micro or size.rollouts,
            max_grad_norm=1e9,  # TRL's PPO does not clip
        ),
        optimizer=optimizer,
    )
    return in_phases(meter, module)


def grpo(spec: Spec, meter: Meter) -> GRPOModule:
    objective = PolicyObjective(aggregation="sequence_mean", kl_placement="loss_k3_token")
    return grouped(spec, meter, GroupMean(), objective)


def rloo(spec: Spec, meter: Meter) -> GRPOModule:
    """With one ratio a response, as TRL has it."""
    loss = SequenceClippedLoss(clip_low=0.2, clip_high=0.2, length_normalised=False)
    objective = PolicyObjective(aggregation="sequence_mean", kl_placement="reward_k1", loss=loss)
    return grouped(spec, meter, LeaveOneOut(), objective)


def grouped(spec: Spec, meter: Meter, advantages: CriticFree, objective: PolicyObjective) -> GRPOModule:
    size = spec.shape
    module = GRPOModule(
        model_spec(spec, spec.policy),
        FunctionReward(odd_share),
        advantages,
        objective,
        FixedKL(KL_COEF),
        groups=Groups(size=size.group),
        sampling=SamplingParameters(max_new_tokens=size.response.most, engine=Forced(spec)),
        update=GRPOUpdate(
            minibatch_size=size.rollouts, micro_batch_size=size.micro or size.rollouts, max_grad_norm=MAX_GRAD_NORM
        ),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=learning_rate(spec), weight_decay=0.0, fused=True),
    )
    learn = module._learn

    def noting_learn(rollout: Rollout) -> bool:
        stopped = learn(rollout)
        if meter.done == 0:
            means = module.update_means
            number = means.names.index("grad_norm")
            norm = means.sums[number] / means.counts[number]
            meter.compare(float(rollout.advantages[:, 0].abs().mean()), float(norm))
        return stopped

    module._learn = noting_learn  # type: ignore[method-assign]
    return in_phases(meter, module)


class Forced(NativeEngine):
    """The native engine; each of its draws is replaced by the token that stands in the rows."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.rows: dict[tuple[int, ...], list[dict[str, list[int]]]] = {}
        for row in spec.rows():
            self.rows.setdefault(tuple(row["prompt_ids"]), []).append(row)

    def generate(self, network: Any, input_ids: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any) -> Any:
        asked = [tuple(ids[real].tolist()) for ids, real in zip(input_ids, attention_mask, strict=True)]
        nth = [asked[:number].count(prompt) for number, prompt in enumerate(asked)]
        rows = [self.rows[prompt][n] for prompt, n in zip(asked, nth, strict=True)]
        self.script = script_of(rows).to(input_ids.device)
        return super().generate(network, input_ids, attention_mask, *args, **kwargs)

    def draw(self, logits: Tensor, sampling: SamplingParameters, rows: Tensor, step: int) -> Tensor:
        super().draw(logits, sampling, rows, step)
        return self.script[rows, step]


def in_phases(meter: Meter, module: Any) -> Any:
    """The module, with the parts of its iteration timed."""
    for name, method in (("generation", "_generate"), ("scoring", "_score"), ("update", "_learn")):
        setattr(module, method, in_phase(meter, name, getattr(module, method)))
    return module


def in_phase(meter: Meter, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, timed as a part of the iteration."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        with meter.phase(name):
            found = method(*args, **kwargs)
        if name == "generation":
            meter.fed(found.input_ids.numel())
        return found

    return timed


def first_step(meter: Meter) -> tuple[PPOLoss, Any]:
    """PPO's loss and AdamW, noting the value loss and the gradient norm of the policy at the first step."""
    seen: dict[str, float] = {}

    class NotingLoss(PPOLoss):
        def value(self, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            total, clipped = super().value(values, old_values, returns, mask)
            if not seen:
                seen["loss"] = float(total / mask.sum())
            return total, clipped

    class NotingAdamW(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            if meter.done == 0 and "grad_norm" not in seen:
                grads = [p.grad for p in self.param_groups[0]["params"] if p.grad is not None]
                seen["grad_norm"] = float(torch.nn.utils.get_total_norm(grads))
                meter.compare(seen["loss"], seen["grad_norm"])
            return super().step(closure)

    return NotingLoss(), lambda groups: NotingAdamW(groups, lr=learning_rate(meter.spec), weight_decay=0.0, fused=True)
