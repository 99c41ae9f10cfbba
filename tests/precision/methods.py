"""Every method at learning rate 0 in one precision: what its first step, or its first iteration, logs."""

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
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import GRPOModule, OnlineDPOModule, PPOModule
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.rollouts.kl_control import FixedKL
from rlhf_lightning.rollouts.mismatch import Importance
from tests.invariance.subjects import Memory, tokenizer, widened
from tests.methods import METHODS as REGISTRY
from tests.methods import methods_for, one_of_each_module

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
    "annotated pairs": (
        {
            "prompt_ids": PROMPTS,
            "chosen_ids": CHOSEN,
            "rejected_ids": REJECTED,
            "margin": [0.3] * COUNT,
            "chosen_probability": [0.9] * COUNT,
        },
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

DEFAULT = Importance()
LN2 = 0.6931471805599453
# What ``train/loss`` is while the policy is its reference, where that does not depend on the weights.
AT_START = {
    "dpo": LN2,
    "robust dpo": LN2,
    "ipo": 1.0,
    "hinge": 1.0,
    "nca": 2 * LN2,
    "kto": 0.5,
    "bco, unpaired": LN2,
    "apo-zero, unpaired": 0.5,
    "online dpo": LN2,
}
# Several minibatches, and micro-batches that cut groups: rows meet others in the update than in the rollout.
UPDATES = {
    GRPOModule: {"minibatch_size": 12, "micro_batch_size": 5},
    PPOModule: {"epochs": 1, "minibatch_size": 4, "micro_batch_size": 3},
    OnlineDPOModule: {"minibatch_size": 8, "micro_batch_size": 6},
}


@dataclass(frozen=True)
class Still:
    """A method of the registry at learning rate 0.

    Attributes:
        name: In the registry.
        loss: What ``train/loss`` must be with policy and reference alike; None where it depends on the weights.
    """

    name: str
    loss: float | None = None

    @property
    def rows(self) -> str:
        """Key of ``ROWS``."""
        return REGISTRY[self.name].rows

    def build(self, spec: ModelSpec, scalar: str, importance: Importance = DEFAULT) -> Any:
        """The module, from the spec of the policy and the folder of a scalar model."""
        method = REGISTRY[self.name]
        if not method.samples:
            return method.build(spec, optimizer=still)
        size = 4 if method.module is GRPOModule else None
        kl = {"kl": FixedKL(0.1)} if method.module is GRPOModule else {}
        return method.build(
            spec,
            scalar,
            group_size=size,
            reward=FunctionReward(reward),
            update={**UPDATES[method.module], "importance": importance},
            sampling=SamplingParameters(max_new_tokens=10, temperature=0.8),
            optimizer=still,
            **kl,
        )


def still(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.0)


METHODS: dict[str, Still] = {name: Still(name, AT_START.get(name)) for name in methods_for("precision")}
OFFLINE = [name for name, method in METHODS.items() if method.rows != "prompts"]
SAMPLING = [name for name, method in METHODS.items() if method.rows == "prompts"]
# One of each module; PPO without a critic, which needs no folder.
TRAINED = ["ppo, shared trunk" if name == "ppo" else name for name in one_of_each_module("precision")]

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
