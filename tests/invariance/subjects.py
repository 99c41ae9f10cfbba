"""The one list of what is held against every re-arrangement, and how each is run: its own module under a real Trainer."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from datasets import Dataset
from lightning.pytorch.loggers import Logger
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.data.chat import ensure_chat_template
from rlhf_lightning.data.collate import (
    PlannedRows,
    PreferenceCollator,
    PromptCollator,
    SequenceCollator,
    StepwiseCollator,
    UnpairedCollator,
    pad_right,
)
from rlhf_lightning.data.rankings import RankingCollator
from rlhf_lightning.data.sampler import BucketBatchSampler
from rlhf_lightning.generation.engine import Generation, GenerationEngine, SamplingParameters
from rlhf_lightning.losses import (
    AlphaDivergence,
    AOTLoss,
    APODownLoss,
    APOZeroLoss,
    APOZeroUnpairedLoss,
    BCOPairLoss,
    BCOUnpairedLoss,
    BradleyTerryLoss,
    CISPOLoss,
    ClippedLoss,
    CPOLoss,
    DPOLoss,
    EXOLoss,
    FDPOLoss,
    HingeLoss,
    IPOLoss,
    JensenShannon,
    LDDPOLoss,
    MixedLoss,
    NCALoss,
    NLLLoss,
    NormalisedDPOLoss,
    ORPOLoss,
    PairLoss,
    PlackettLuceLoss,
    PolicyObjective,
    PPOLoss,
    ReinforceLoss,
    RobustDPOLoss,
    SequenceClippedLoss,
    SimPOLoss,
    SPPOHardLoss,
    UnpairedLoss,
    WPOLoss,
)
from rlhf_lightning.models.ensemble import Ensemble
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import (
    DPOModule,
    GRPOModule,
    KTOModule,
    PPOModule,
    ProcessRewardModule,
    RewardModelModule,
    SFTModule,
    strategies,  # noqa: F401  (fsdp2)
)
from rlhf_lightning.modules.grpo_update import Groups, GRPOUpdate
from rlhf_lightning.modules.handoff import shard_if_asked
from rlhf_lightning.modules.moving_reference import MovingReference
from rlhf_lightning.modules.optimization import Schedule, whole
from rlhf_lightning.modules.ppo import PPOUpdate
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.rollouts.buffer import Rollout
from rlhf_lightning.rollouts.collect import Responses
from rlhf_lightning.rollouts.group_advantages import CriticFree, GreedyBaseline, GroupMean, LeaveOneOut, ReturnToGo
from rlhf_lightning.rollouts.kl_control import AdaptiveKL
from tests.invariance.rearrangements import (
    EOS,
    PAD,
    ROWS,
    STEP,
    VOCABULARY,
    Arrangement,
    filling,
    lay_out,
    lay_out_prompts,
)

HIDDEN = 16
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "absolute": {"model_type": "gpt2", "n_embd": HIDDEN, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "rotary": {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}


@lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    """<pad> 0, <bos> 1, <eos> 2, <unk> 3, then a to h."""
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *"abcdefgh"]
    backend = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {name: f"<{name.split('_')[0]}>" for name in ("pad_token", "bos_token", "eos_token", "unk_token")}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    ensure_chat_template(made)
    return made


def widened(network: nn.Module, seed: int) -> None:
    """Weights so large that every position and every token matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


# ---------------------------------------------------------------- rows of uneven length


def texts(seed: int, shortest: int, longest: int, last: int | None = None) -> list[list[int]]:
    """Token ids of uneven length; PAD and EOS stand among them as tokens like any other."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (ROWS,), generator=generator)
    rows = [torch.randint(VOCABULARY, (int(n),), generator=generator).tolist() for n in lengths]
    return rows if last is None else [[*row, last] for row in rows]


PROMPTS = [[4 + row % 8, 4 + row // 8, *more] for row, more in enumerate(texts(1, 0, 4))]  # no two alike
CHOSEN, REJECTED = texts(2, 0, 5, EOS), texts(3, 1, 7, EOS)
LONGEST = 8  # new tokens
# EOS ends a response, so none inside; every third goes on to the longest without one.
ANSWERS = [
    [t for t in row if t != EOS][:LONGEST] if i % 3 == 0 else [*(t for t in row[: 1 + i % 6] if t != EOS), EOS]
    for i, row in enumerate(texts(4, 20, 20))
]
MARGINS = [0.5 * (row % 4) for row in range(ROWS)]

DEMONSTRATIONS = {
    "input_ids": [p + c for p, c in zip(PROMPTS, CHOSEN, strict=True)],
    "response_mask": [[0] * len(p) + [1] * len(c) for p, c in zip(PROMPTS, CHOSEN, strict=True)],
}
WEIGHTED = {**DEMONSTRATIONS, "weight": [0.25 + row % 3 for row in range(ROWS)]}
SOLUTIONS = {  # two steps each, of which every third row has only the second labelled
    "input_ids": [p + c + r for p, c, r in zip(PROMPTS, CHOSEN, REJECTED, strict=True)],
    "prompt_length": [len(p) for p in PROMPTS],
    "label_at": [
        [len(p + c) - 1, len(p + c + r) - 1][row % 3 == 2 :]
        for row, (p, c, r) in enumerate(zip(PROMPTS, CHOSEN, REJECTED, strict=True))
    ],
    "labels": [[1.0 - row % 4 / 8, float(row % 4 != 1)][row % 3 == 2 :] for row in range(ROWS)],
}
PREFERENCES = {"prompt_ids": PROMPTS, "chosen_ids": CHOSEN, "rejected_ids": REJECTED, "margin": MARGINS}
RANKED = [
    [a, b, c][: 2 + row % 2] for row, (a, b, c) in enumerate(zip(CHOSEN, REJECTED, texts(5, 1, 4, EOS), strict=True))
]
RANKINGS = {
    "prompt_ids": PROMPTS,
    "completion_ids": [[token for answer in answers for token in answer] for answers in RANKED],
    "completion_lengths": [[len(answer) for answer in answers] for answers in RANKED],
    "ranks": [[1.0, 0.0, row % 3 / 1.0][: len(answers)] for row, answers in enumerate(RANKED)],
    "weight": [1.0 + row % 3 / 2 for row in range(ROWS)],
}
ANNOTATED = {
    **PREFERENCES,
    "chosen_probability": [(1.0, 0.7, 0.5)[row % 3] for row in range(ROWS)],
    "weight": [0.5 + row % 4 for row in range(ROWS)],
}
UNPAIRED = {
    "prompt_ids": PROMPTS,
    "completion_ids": [*CHOSEN[:4], *REJECTED[4:]],
    "label": [row in (0, 2, 3, 5, 8, 10) for row in range(ROWS)],
}
PROMPT_ROWS = {"prompt_ids": PROMPTS, "prompt": [str(row) for row in range(ROWS)], "number": list(range(ROWS))}


ROW_OF = {tuple(prompt): row for row, prompt in enumerate(PROMPTS)}


class Answers(GenerationEngine):
    """Answers every prompt with what belongs to it, so that ranks and orders see the same responses."""

    def generate(self, network, input_ids, attention_mask, sampling, *, eos_ids, pad_id):
        asked = [tuple(row[real].tolist()) for row, real in zip(input_ids, attention_mask, strict=True)]
        # Who asks again gets the answer to another prompt: the responses of a group differ.
        numbers = [ROW_OF[prompt] + 5 * asked[:place].count(prompt) for place, prompt in enumerate(asked)]
        answers = [ANSWERS[number % ROWS] for number in numbers]
        return Generation(pad_right(answers, pad_id)[0])


def scored(number: list[int], completion_ids: list[list[int]]) -> list[float]:
    return [sum(ids) % 7 / 2 - 1 + n / 10 for n, ids in zip(number, completion_ids, strict=True)]


# ---------------------------------------------------------------- the list


@dataclass(frozen=True)
class Subject:
    """A module with its rows.

    Attributes:
        build: The module, from an architecture and the folder of a trained scalar model of that architecture.
        columns: Its tokenized rows.
        collator: Makes its batches.
        weights: What each row adds to the denominator of the loss.
        online: Whether ``micro`` is the module's own affair rather than the Trainer's.
        dtype: Of the weights. In float64 rounding leaves no room to hide; scalar heads are float32 whatever the weights are.
        whole_step: Whether its loss looks at all rows of a step at once, so that it has no micro-batches.
    """

    build: Callable[[dict[str, Any], str, Arrangement], pl.LightningModule]
    columns: dict[str, list[Any]]
    collator: Any
    weights: list[float]
    online: bool = False
    dtype: torch.dtype = torch.float64
    whole_step: bool = False

    def takes(self, arrangement: Arrangement) -> bool:
        """Whether its rows can be laid out so."""
        if self.whole_step and arrangement.micro < STEP:
            return False
        # Prompts end in the last column, whatever they hold, and responses begin in the first: no text at the right end.
        return not (self.online and arrangement.flush_right)


def sgd(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    """Steps in proportion to the gradient: Adam would hide its scale and blow up its rounding errors."""
    return lambda params: torch.optim.SGD(params, lr=lr)


ATTENTION = {True: None, False: "eager"}  # rows are laid end to end where nobody asks for an attention of their own


def spec(architecture: dict[str, Any], arrangement: Arrangement) -> ModelSpec:
    return ModelSpec(architecture=architecture, attn_implementation=ATTENTION[arrangement.packed])


def build_sft(architecture: dict[str, Any], scalar: str, arrangement: Arrangement) -> pl.LightningModule:
    return SFTModule(spec(architecture, arrangement), optimizer=sgd(0.05))


def build_process_reward(architecture: dict[str, Any], scalar: str, arrangement: Arrangement) -> pl.LightningModule:
    return ProcessRewardModule(spec(architecture, arrangement), optimizer=sgd(0.005))


def build_reward_model(architecture: dict[str, Any], scalar: str, arrangement: Arrangement) -> pl.LightningModule:
    loss = BradleyTerryLoss(centering_coef=0.05, margin_scale=0.7)
    return RewardModelModule(spec(architecture, arrangement), loss, optimizer=sgd(0.005), normalise=False)


def build_ranking(loss: Any, **settings: Any) -> Callable[[dict[str, Any], str, Arrangement], pl.LightningModule]:
    def build(architecture: dict[str, Any], scalar: str, arrangement: Arrangement) -> pl.LightningModule:
        network = spec(architecture, arrangement)
        return RewardModelModule(network, loss, optimizer=sgd(0.005), normalise=False, **settings)

    return build


def build_dpo(
    loss: PairLoss, lr: float, **settings: Any
) -> Callable[[dict[str, Any], str, Arrangement], pl.LightningModule]:
    def build(architecture: dict[str, Any], scalar: str, arrangement: Arrangement) -> pl.LightningModule:
        return DPOModule(spec(architecture, arrangement), loss, optimizer=sgd(lr), **settings)

    return build


# What is the matter with one is the matter with the sum. Weights bring squares and exponentials down to the size of the others.
PAIR_LOSSES: dict[PairLoss, float] = {
    RobustDPOLoss(0.3): 1.0,
    HingeLoss(0.3): 1.0,
    EXOLoss(0.3, 0.1): 1.0,
    NormalisedDPOLoss(2.0): 1.0,
    LDDPOLoss(0.3): 1.0,
    FDPOLoss(0.3, JensenShannon()): 1.0,
    FDPOLoss(0.3, AlphaDivergence(0.9)): 0.1,
    NCALoss(0.3): 1.0,
    BCOPairLoss(0.3): 1.0,
    SPPOHardLoss(0.5): 0.01,
    APOZeroLoss(0.3): 1.0,
    APODownLoss(0.3): 1.0,
    WPOLoss(SimPOLoss()): 1.0,
    CPOLoss(0.3, nll_coef=0.1): 1.0,
    ORPOLoss(): 1.0,
    NLLLoss(per_token=True): 1.0,
}
EVERY_PAIR_LOSS = MixedLoss(list(PAIR_LOSSES), list(PAIR_LOSSES.values()))


def build_kto(loss: UnpairedLoss, lr: float) -> Callable[[dict[str, Any], str, Arrangement], pl.LightningModule]:
    def build(architecture: dict[str, Any], scalar: str, arrangement: Arrangement) -> pl.LightningModule:
        return KTOModule(spec(architecture, arrangement), loss, optimizer=sgd(lr))

    return build


def build_ppo(critic: bool) -> Callable[[dict[str, Any], str, Arrangement], pl.LightningModule]:
    def build(architecture: dict[str, Any], scalar: str, arrangement: Arrangement) -> pl.LightningModule:
        module = PPOModule(
            spec(architecture, arrangement),
            ModelSpec(path=scalar, attn_implementation=ATTENTION[arrangement.packed]) if critic else None,
            FunctionReward(scored),
            kl=AdaptiveKL(init=0.2, target=1.0, horizon=50),
            sampling=SamplingParameters(max_new_tokens=LONGEST, temperature=0.7),
            loss=PPOLoss(value_coef=0.5, entropy_coef=0.01),
            update=PPOUpdate(epochs=2, minibatch_size=STEP, micro_batch_size=arrangement.micro, max_grad_norm=1e6),
            optimizer=sgd(0.01),
            schedule=Schedule(decay="constant"),
        )
        module.engine = Answers()
        return module

    return build


def build_group(
    advantages: CriticFree, objective: PolicyObjective, lr: float = 0.001, **groups: Any
) -> Callable[[dict[str, Any], str, Arrangement], pl.LightningModule]:
    def build(architecture: dict[str, Any], scalar: str, arrangement: Arrangement) -> pl.LightningModule:
        module = GRPOModule(
            spec(architecture, arrangement),
            FunctionReward(scored),
            advantages,
            objective,
            kl=AdaptiveKL(init=0.2, target=1.0, horizon=50),
            groups=Groups(size=2, **groups),
            sampling=SamplingParameters(max_new_tokens=LONGEST, temperature=0.7),
            update=GRPOUpdate(epochs=2, minibatch_size=2 * STEP, micro_batch_size=arrangement.micro, max_grad_norm=1e6),
            optimizer=sgd(lr),
            schedule=Schedule(decay="constant"),
        )
        module.engine = Answers()
        return module

    return build


PAIRS: dict[str, Any] = {"columns": PREFERENCES, "collator": PreferenceCollator(PAD), "weights": [1] * ROWS}
RANKED_ROWS: dict[str, Any] = {"columns": RANKINGS, "collator": RankingCollator(PAD)}
SINGLES: dict[str, Any] = {"columns": UNPAIRED, "collator": UnpairedCollator(PAD, 64), "weights": [1] * ROWS}
ONLINE: dict[str, Any] = {
    "columns": PROMPT_ROWS,
    "collator": PromptCollator(PAD),
    "weights": [1] * ROWS,
    "online": True,
}
SUBJECTS: dict[str, Subject] = {
    "sft": Subject(build_sft, DEMONSTRATIONS, SequenceCollator(PAD), [len(row) for row in CHOSEN]),
    "sft, weighted": Subject(
        build_sft,
        WEIGHTED,
        SequenceCollator(PAD),
        [w * len(row) for w, row in zip(WEIGHTED["weight"], CHOSEN, strict=True)],
    ),
    "process reward": Subject(
        build_process_reward, SOLUTIONS, StepwiseCollator(PAD), [len(row) for row in SOLUTIONS["labels"]]
    ),
    "reward model": Subject(build_reward_model, **(PAIRS | {"columns": ANNOTATED})),
    "rankings, ensemble": Subject(
        build_ranking(BradleyTerryLoss(centering_coef=0.05), ensemble=Ensemble(2, "own")), **(PAIRS | RANKED_ROWS)
    ),
    "plackett-luce": Subject(build_ranking(PlackettLuceLoss()), **(PAIRS | RANKED_ROWS)),
    "dpo": Subject(build_dpo(DPOLoss(beta=0.3, label_smoothing=0.1), 0.01), **PAIRS),
    "ipo": Subject(build_dpo(IPOLoss(tau=0.5), 1e-4), **PAIRS),
    "every pair loss": Subject(
        build_dpo(EVERY_PAIR_LOSS, 0.005, moving_reference=MovingReference(every=1)), **PAIRS
    ),
    "aot": Subject(build_dpo(AOTLoss(beta=0.3), 0.01), **PAIRS, whole_step=True),
    # KTO's own reference point is of the micro-batch; what holds for it is in integration/test_kto.py.
    "apo-zero, unpaired": Subject(build_kto(APOZeroUnpairedLoss(0.3, 1.2, 0.8), 0.01), **SINGLES),
    "bco, unpaired": Subject(build_kto(BCOUnpairedLoss(0.3, 1.2, 0.8), 0.01), **SINGLES),
    "ppo": Subject(build_ppo(critic=True), **ONLINE),
    "ppo, shared trunk": Subject(build_ppo(critic=False), **ONLINE),
    "grpo": Subject(
        build_group(GroupMean(), PolicyObjective("sequence_mean", "loss_k3_token", entropy_coef=0.01), lr=0.01),
        **ONLINE,
    ),
    "rloo": Subject(
        build_group(LeaveOneOut(), PolicyObjective("sequence_sum", "reward_k1", ReinforceLoss())), **ONLINE
    ),
    "reinforce++": Subject(
        build_group(ReturnToGo(group_baseline=True), PolicyObjective("token_mean", "loss_k2_sequence", CISPOLoss())),
        **ONLINE,
    ),
    "gspo": Subject(
        build_group(
            GroupMean(scale="batch"),
            PolicyObjective("constant_length", "loss_k3_token", SequenceClippedLoss()),
            mask_truncated=True,
        ),
        **ONLINE,
    ),
    "remax": Subject(
        build_group(GreedyBaseline(), PolicyObjective("sequence_sum", "reward_k1", ClippedLoss())), **ONLINE
    ),
}


# ---------------------------------------------------------------- a run


class Memory(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Of no interest."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({**metrics, "step": float(step or 0)})


class Gradients(pl.Callback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.steps.append({k: whole(p.grad).clone() for k, p in pl_module.named_parameters() if p.grad is not None})


@dataclass(frozen=True)
class Trace:
    """All that a run shows: logged rows, gradients of each step, weights at the end."""

    logged: list[dict[str, float]]
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]


def configured(subject: Subject, architecture: str, scalar: str, arrangement: Arrangement) -> Any:
    """The module with wide weights, and a reference that is not its policy."""
    module: Any = subject.build(ARCHITECTURES[architecture], scalar, arrangement)
    module.tokenizer = tokenizer()
    module.configure_model()
    widened(module.to(subject.dtype), 11)
    if hasattr(module, "reference"):
        widened(module.reference.network.to(subject.dtype), 12)
    if subject.online:
        rearrange_rollouts(module, arrangement)
    return module


def rearrange_rollouts(module: Any, arrangement: Arrangement) -> None:
    """Columns are added where responses come from, NaN wherever a rollout goes from one stage to the next."""
    generate, collect, learn, finish = module._generate, module._collect, module._learn, module._finish
    module._generate = lambda *args: stretched(generate(*args), arrangement)
    if arrangement.filler == "garbage":
        module._collect = lambda batch: littered(collect(batch))
        module._learn = lambda rollout, *more: learn(littered(rollout), *more)
        module._finish = lambda rollout, *more: finish(littered(rollout), *more)


def stretched(responses: Responses, arrangement: Arrangement) -> Responses:
    """With columns after the longest response."""
    masks = ("attention_mask", "sequence_mask", "response_mask")
    wide = {name: functional.pad(getattr(responses, name), (0, arrangement.after)) for name in masks}
    real = wide["attention_mask"]
    ids = filling((len(real), real.shape[1]), arrangement)
    ids[real] = responses.input_ids[responses.attention_mask]
    return replace(responses, input_ids=ids, **wide)


def littered(rollout: Rollout) -> Rollout:
    """With NaN where no token is."""
    numbers = {f.name: getattr(rollout, f.name) for f in fields(rollout)}
    per_token = {k: v for k, v in numbers.items() if v.is_floating_point() and v.dim() == 2}
    return replace(rollout, **{k: v.masked_fill(~rollout.response_mask, torch.nan) for k, v in per_token.items()})


def batches(subject: Subject, arrangement: Arrangement, rank: int = 0, world: int = 1) -> list[Any]:
    """The micro-batches of both steps on one rank, with the normaliser that the project's own sampler gives."""
    micro = STEP // world if subject.online else min(arrangement.micro, STEP // world)
    order = [*arrangement.permuted(0), *arrangement.permuted(1)]
    sampler = BucketBatchSampler(
        list(range(ROWS)),  # as lengths: the sampler keeps this order
        [subject.weights[row] for row in order],
        batch_size=micro,
        shuffle=False,
        rank=rank,
        world_size=world,
        accumulate=accumulation(subject, arrangement, world),
    )
    dataset = PlannedRows(Dataset.from_dict(subject.columns).select(order))
    made = [subject.collator(dataset.__getitems__(plan)) for plan in sampler]
    again: Any = lay_out_prompts if subject.online else lay_out
    return [again(batch, arrangement) for batch in made]


def accumulation(subject: Subject, arrangement: Arrangement, world: int) -> int:
    return 1 if subject.online else max(1, STEP // (arrangement.micro * world))


def sharded(module: Any) -> None:
    """As ``configure_model`` does it, for a module that is configured already."""
    for network in (getattr(module, "actor_critic", None) or getattr(module, "policy", None) or module.network,):
        shard_if_asked(module, network)
    if hasattr(module, "reference"):
        shard_if_asked(module, module.reference.network)


def run(
    subject: Subject,
    architecture: str,
    scalar: str,
    arrangement: Arrangement,
    world: int = 1,
    rank: int = 0,
    strategy: str = "ddp",
) -> Trace:
    """Two optimizer steps (PPO: two iterations) and a validation under a real Trainer."""
    pl.seed_everything(0, verbose=False)
    module = configured(subject, architecture, scalar, arrangement)
    module.configure_model = partial(sharded, module)
    memory, gradients = Memory(), Gradients()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy if world > 1 else "auto",
        max_epochs=1,
        accumulate_grad_batches=accumulation(subject, arrangement, world),
        logger=memory,
        callbacks=[gradients],
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows: Any = batches(subject, arrangement, rank, world)
    loader = DataLoader(rows, batch_size=None, collate_fn=lambda batch: batch)
    trainer.fit(module, loader, loader)
    weights = {name: whole(value).clone() for name, value in module.state_dict().items()}
    return Trace(memory.rows, gradients.steps, weights)


def scalar_folder(base: Path, architecture: str) -> str:
    """An exported scalar model, for critics: they refuse a head that nobody trained."""
    network = load_scalar_model(ModelSpec(architecture=ARCHITECTURES[architecture]), tokenizer(), new_head=True)
    return str(export_folder(network, tokenizer(), base / architecture))
