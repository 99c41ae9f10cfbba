"""Every method at learning rate 0 in one precision: what its first step, or its first iteration, logs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from rlhf_lightning.data.collate import (
    PlannedRows,
    PreferenceCollator,
    PromptCollator,
    SequenceCollator,
    StepwiseCollator,
    UnpairedCollator,
)
from rlhf_lightning.data.sampler import BatchPlan
from rlhf_lightning.generation.engine import GenerationEngine, SamplingParameters
from rlhf_lightning.losses import (
    APOZeroUnpairedLoss,
    BCOUnpairedLoss,
    CISPOLoss,
    ClippedLoss,
    DPOLoss,
    HingeLoss,
    IPOLoss,
    NCALoss,
    PolicyObjective,
    PPOLoss,
    ReinforceLoss,
    RobustDPOLoss,
    SequenceClippedLoss,
    SimPOLoss,
)
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import (
    DPOModule,
    GRPOModule,
    KTOModule,
    OnlineDPOModule,
    PPOModule,
    ProcessRewardModule,
    RewardModelModule,
    SFTModule,
)
from rlhf_lightning.modules.grpo_update import Groups, GRPOUpdate
from rlhf_lightning.modules.ppo_update import PPOUpdate
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.rollouts.group_advantages import BatchMean, GreedyBaseline, GroupMean, LeaveOneOut, ReturnToGo
from rlhf_lightning.rollouts.kl_control import FixedKL
from rlhf_lightning.rollouts.mismatch import Importance
from tests.invariance.subjects import Memory, tokenizer, widened

EOS, PAD = 2, 0
TINY = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
}


class Precision(NamedTuple):
    """What a user sets: the Trainer's precision, and the dtype of the weights."""

    trainer: str
    dtype: str = "float32"

    @property
    def half(self) -> bool:
        return self.trainer != "32-true" or self.dtype != "float32"

    def __str__(self) -> str:
        return self.trainer if self.dtype == "float32" else f"{self.trainer}, {self.dtype}"


PRECISIONS = [Precision("32-true"), Precision("bf16-mixed"), Precision("bf16-true"), Precision("32-true", "bfloat16")]

# ---------------------------------------------------------------- rows


def random_rows(seed: int, count: int, shortest: int, longest: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(4, 12, (n,), generator=generator).tolist() for n in lengths]


COUNT = 6
PROMPTS = random_rows(1, COUNT, 16, 22)  # long enough to be read once for all the responses of a group
CHOSEN, REJECTED = ([[*row, EOS] for row in random_rows(seed, COUNT, 1, 9)] for seed in (2, 3))
ROWS: dict[str, tuple[dict[str, list[Any]], Any]] = {
    "texts": (
        {
            "input_ids": [p + c for p, c in zip(PROMPTS, CHOSEN, strict=True)],
            "response_mask": [[0] * len(p) + [1] * len(c) for p, c in zip(PROMPTS, CHOSEN, strict=True)],
        },
        SequenceCollator(PAD),
    ),
    "pairs": (
        {"prompt_ids": PROMPTS, "chosen_ids": CHOSEN, "rejected_ids": REJECTED, "margin": [0.3] * COUNT},
        PreferenceCollator(PAD),
    ),
    "steps": (
        {
            "input_ids": [p + c + r for p, c, r in zip(PROMPTS, CHOSEN, REJECTED, strict=True)],
            "prompt_length": [len(p) for p in PROMPTS],
            "label_at": [
                [len(p + c) - 1, len(p + c + r) - 1] for p, c, r in zip(PROMPTS, CHOSEN, REJECTED, strict=True)
            ],
            "labels": [[1.0, 0.25]] * COUNT,
        },
        StepwiseCollator(PAD),
    ),
    "unpaired": (
        {"prompt_ids": PROMPTS, "completion_ids": CHOSEN, "label": [row % 2 == 0 for row in range(COUNT)]},
        UnpairedCollator(PAD, 64),
    ),
    "prompts": ({"prompt_ids": PROMPTS, "prompt": [str(row) for row in range(COUNT)]}, PromptCollator(PAD)),
}


def reward(completion_ids: list[list[int]]) -> list[float]:
    return [len(ids) / 8 + sum(ids) % 5 for ids in completion_ids]


# ---------------------------------------------------------------- methods


@dataclass(frozen=True)
class Method:
    """A module with its rows, and the loss at step 0 where it is known.

    Attributes:
        rows: Key of ``ROWS``.
        build: The module, from the spec of the policy and the folder of a scalar model.
        loss: What ``train/loss`` must be with policy and reference alike; None where it depends on the weights.
    """

    rows: str
    build: Callable[..., Any]
    loss: float | None = None


def still(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.0)


STILL: dict[str, Any] = {"optimizer": still}
ONLINE = STILL | {"sampling": SamplingParameters(max_new_tokens=10, temperature=0.8)}
# Several minibatches, and micro-batches that cut groups: rows meet others in the update than in the rollout.
CUT: dict[str, Any] = {"minibatch_size": 12, "micro_batch_size": 5}
DEFAULT = Importance()
LN2 = 0.6931471805599453


def pairs(loss: Any, at_start: float | None) -> Method:
    return Method("pairs", lambda spec, scalar: DPOModule(spec, loss, **STILL), at_start)


def unpaired(loss: Any, at_start: float | None) -> Method:
    return Method("unpaired", lambda spec, scalar: KTOModule(spec, loss, **STILL), at_start)


def group(advantages: Any, objective: PolicyObjective) -> Method:
    def build(spec: ModelSpec, scalar: str, importance: Importance = DEFAULT) -> Any:
        update = GRPOUpdate(**CUT, importance=importance)
        arguments = (spec, FunctionReward(reward), advantages, objective, FixedKL(0.1), Groups(size=4))
        return GRPOModule(*arguments, update=update, **ONLINE)

    return Method("prompts", build)


def ppo(critic: bool) -> Method:
    def build(spec: ModelSpec, scalar: str, importance: Importance = DEFAULT) -> Any:
        own = ModelSpec(path=scalar, dtype=spec.dtype) if critic else None
        update = PPOUpdate(epochs=1, minibatch_size=4, micro_batch_size=3, importance=importance)
        return PPOModule(spec, own, FunctionReward(reward), loss=PPOLoss(), update=update, **ONLINE)

    return Method("prompts", build)


def online_dpo(spec: ModelSpec, scalar: str, importance: Importance = DEFAULT) -> Any:
    update = GRPOUpdate(minibatch_size=8, micro_batch_size=6, importance=importance)
    return OnlineDPOModule(spec, FunctionReward(reward), groups=Groups(size=3), update=update, **ONLINE)


METHODS: dict[str, Method] = {
    "sft": Method("texts", lambda spec, scalar: SFTModule(spec, **STILL)),
    "reward model": Method("pairs", lambda spec, scalar: RewardModelModule(spec, normalise=False, **STILL)),
    "process reward": Method("steps", lambda spec, scalar: ProcessRewardModule(spec, **STILL)),
    "dpo": pairs(DPOLoss(beta=0.5), LN2),
    "robust dpo": pairs(RobustDPOLoss(beta=0.5), LN2),
    "ipo": pairs(IPOLoss(tau=0.5), 1.0),
    "hinge": pairs(HingeLoss(beta=0.5), 1.0),
    "nca": pairs(NCALoss(beta=0.5), 2 * LN2),
    "simpo": pairs(SimPOLoss(), None),
    "kto": Method("unpaired", lambda spec, scalar: KTOModule(spec, **STILL), 0.5),
    "bco": unpaired(BCOUnpairedLoss(), LN2),
    "apo-zero": unpaired(APOZeroUnpairedLoss(), 0.5),
    "ppo": ppo(critic=True),
    "ppo, shared trunk": ppo(critic=False),
    "grpo": group(GroupMean(), PolicyObjective("sequence_mean", "loss_k3_token")),
    "rloo": group(LeaveOneOut(), PolicyObjective("sequence_sum", "reward_k1", ReinforceLoss())),
    "rloo, sequence ratio": group(
        LeaveOneOut(),
        PolicyObjective("sequence_sum", "reward_k1", SequenceClippedLoss(0.2, 0.2, length_normalised=False)),
    ),
    "reinforce": group(BatchMean(), PolicyObjective("sequence_sum", "reward_k1", ReinforceLoss())),
    "reinforce++": group(ReturnToGo(), PolicyObjective("token_mean", "loss_k2_sequence")),
    "dapo": group(GroupMean(), PolicyObjective("token_mean", "reward_k1", ClippedLoss(clip_high=0.28))),
    "gspo": group(GroupMean(), PolicyObjective("sequence_mean", "loss_k3_token", SequenceClippedLoss())),
    "cispo": group(GroupMean(), PolicyObjective("token_mean", "loss_k3_token", CISPOLoss())),
    "remax": group(GreedyBaseline(), PolicyObjective("sequence_sum", "reward_k1")),
    "online dpo": Method("prompts", online_dpo, LN2),
}
OFFLINE = [name for name, method in METHODS.items() if method.rows != "prompts"]
SAMPLING = [name for name, method in METHODS.items() if method.rows == "prompts"]

# ---------------------------------------------------------------- runs


@lru_cache(maxsize=1)
def folders(base: Path) -> tuple[str, str]:
    """A policy whose every token matters, and a scalar model, as exported folders."""
    torch.manual_seed(0)
    spec = ModelSpec(architecture=TINY)
    policy, scalar = load_causal_lm(spec, tokenizer()), load_scalar_model(spec, tokenizer(), new_head=True)
    widened(policy, 3)
    export_folder(policy, tokenizer(), base / "policy")
    export_folder(scalar, tokenizer(), base / "scalar")
    return str(base / "policy"), str(base / "scalar")


def batch_of(rows: str) -> Any:
    columns, collator = ROWS[rows]
    return collator(PlannedRows(Dataset.from_dict(columns)).__getitems__(BatchPlan(list(range(COUNT)), float(COUNT))))


def fit(
    module: Any, rows: str, precision: str, *, steps: int = 1, strategy: str = "auto", devices: int = 1
) -> list[dict[str, float]]:
    """Train on one batch, again and again.

    Returns:
        What was logged, without the prefix ``train/``.
    """
    pl.seed_everything(0, verbose=False)
    if not hasattr(module, "tokenizer"):
        module.tokenizer = tokenizer()
    memory = Memory()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        precision=precision,
        max_epochs=1,
        limit_train_batches=steps,
        logger=memory,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    made: Any = [batch_of(rows) for _ in range(steps)]
    trainer.fit(module, DataLoader(made, batch_size=None, collate_fn=lambda batch: batch))
    return [{name.removeprefix("train/"): value for name, value in row.items()} for row in memory.rows]


def first_step(
    name: str,
    precision: Precision,
    base: Path,
    engine: GenerationEngine | None = None,
    importance: Importance | None = None,
) -> dict[str, float]:
    """What a method logs of its first step, or iteration, at learning rate 0.

    Args:
        name: Of the method.
        precision: What to compute in.
        base: Folder of the networks.
        engine: Samples, where the method does.
        importance: How its numbers are corrected for.
    """
    method, (policy, scalar) = METHODS[name], folders(base)
    build = method.build if importance is None else partial(method.build, importance=importance)
    module = build(ModelSpec(path=policy, dtype=precision.dtype), scalar)  # type: ignore[arg-type]
    if engine is not None:
        module.engine = engine
    return fit(module, method.rows, precision.trainer)[0]
