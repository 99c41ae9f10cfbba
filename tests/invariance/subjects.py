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
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import (
    GRPOModule,
    OnlineDPOModule,
    ProcessRewardModule,
    RewardModelModule,
    strategies,  # noqa: F401  (fsdp2)
)
from rlhf_lightning.modules.handoff import shard_if_asked
from rlhf_lightning.modules.optimization import Schedule, whole
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.rollouts.buffer import Rollout
from rlhf_lightning.rollouts.collect import Responses
from rlhf_lightning.rollouts.kl_control import AdaptiveKL
from tests.invariance.rearrangements import (
    EOS,
    IN_ORDER,
    PAD,
    ROWS,
    STEP,
    VOCABULARY,
    Arrangement,
    filling,
    lay_out,
    lay_out_prompts,
)
from tests.methods import METHODS, Method, methods_for

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

COLUMNS: dict[str, dict[str, list[Any]]] = {
    "texts": DEMONSTRATIONS,
    "weighted texts": WEIGHTED,
    "steps": SOLUTIONS,
    "pairs": PREFERENCES,
    "annotated pairs": ANNOTATED,
    "rankings": RANKINGS,
    "unpaired": UNPAIRED,
    "prompts": PROMPT_ROWS,
}
COLLATORS: dict[str, Any] = {
    "texts": SequenceCollator(PAD),
    "weighted texts": SequenceCollator(PAD),
    "steps": StepwiseCollator(PAD),
    "pairs": PreferenceCollator(PAD),
    "annotated pairs": PreferenceCollator(PAD),
    "rankings": RankingCollator(PAD),
    "unpaired": UnpairedCollator(PAD, 64),
    "prompts": PromptCollator(PAD),
}
# What each row adds to the denominator of the loss; 1 where nothing else is said.
WEIGHTS: dict[str, list[float]] = {
    "texts": [len(row) for row in CHOSEN],
    "weighted texts": [w * len(row) for w, row in zip(WEIGHTED["weight"], CHOSEN, strict=True)],
    "steps": [len(row) for row in SOLUTIONS["labels"]],
}


@dataclass(frozen=True)
class Subject:
    """A method of the registry, as these tests run it.

    Attributes:
        method: Which one.
        lr: Of plain gradient descent.
        whole_step: Whether its loss looks at all rows of a step at once, so that it has no micro-batches.
        neighbours: Whether its loss also depends on which row comes before which.
    """

    method: Method
    lr: float
    whole_step: bool = False
    neighbours: bool = False

    @property
    def online(self) -> bool:
        """Whether ``micro`` is the module's own affair rather than the Trainer's."""
        return self.method.samples

    @property
    def columns(self) -> dict[str, list[Any]]:
        """Its tokenized rows."""
        return COLUMNS[self.method.rows]

    @property
    def collator(self) -> Any:
        """Makes its batches."""
        return COLLATORS[self.method.rows]

    @property
    def weights(self) -> list[float]:
        """What each row adds to the denominator of the loss."""
        return WEIGHTS.get(self.method.rows, [1.0] * ROWS)

    def takes(self, arrangement: Arrangement) -> bool:
        """Whether its rows can be laid out so."""
        if (self.whole_step or self.neighbours) and arrangement.micro < STEP:
            return False
        if self.neighbours and arrangement.order != IN_ORDER:
            return False
        # Prompts end in the last column, whatever they hold, and responses begin in the first: no text at the right end.
        return not (self.online and arrangement.flush_right)

    def build(self, architecture: dict[str, Any], scalar: str, arrangement: Arrangement) -> Any:
        """The module, from an architecture and the folder of a trained scalar model of that architecture."""
        spec = ModelSpec(architecture=architecture, attn_implementation=ATTENTION[arrangement.packed])
        if not self.online:
            return self.method.build(spec, optimizer=sgd(self.lr))
        module = self.method.build(spec, scalar, optimizer=sgd(self.lr), **self.sampling(arrangement))
        module.engine = Answers()
        return module

    def sampling(self, arrangement: Arrangement) -> dict[str, Any]:
        """How a method that samples is run: two passes over all that was drawn in one step each."""
        together = self.method.together
        update = {
            "epochs": 2,
            "minibatch_size": 2 * STEP if self.method.groups else STEP,
            "micro_batch_size": together * arrangement.micro,
            "max_grad_norm": 1e6,
        }
        kl = {} if self.method.module is OnlineDPOModule else {"kl": AdaptiveKL(init=0.2, target=1.0, horizon=50)}
        return {
            "reward": FunctionReward(scored),
            "sampling": SamplingParameters(max_new_tokens=LONGEST, temperature=0.7),
            "update": update,
            "schedule": Schedule(decay="constant"),
            **kl,
        }


def sgd(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    """Steps in proportion to the gradient: Adam would hide its scale and blow up its rounding errors."""
    return lambda params: torch.optim.SGD(params, lr=lr)


ATTENTION = {True: None, False: "eager"}  # sequences are packed unless an attention is asked for
LEARNING_RATES = {
    "sft": 0.05,
    "sft, weighted": 0.05,
    "dpo": 0.01,
    "ipo": 1e-4,
    "every pair loss": 0.005,
    "aot": 0.01,
    "kto": 0.01,
    "apo-zero, unpaired": 0.01,
    "bco, unpaired": 0.01,
    "ppo": 0.01,
    "ppo, shared trunk": 0.01,
    "grpo": 0.01,
    "online dpo": 0.01,
    "online cpo": 0.01,
}
SHARED_RATES = {RewardModelModule: 0.005, ProcessRewardModule: 0.005, GRPOModule: 0.001}


def subject_of(name: str) -> Subject:
    """The method of that name."""
    method = METHODS[name]
    return Subject(
        method,
        LEARNING_RATES.get(name) or SHARED_RATES[method.module],
        whole_step=name == "aot",
        neighbours=name == "kto",
    )


SUBJECTS: dict[str, Subject] = {name: subject_of(name) for name in methods_for("layout")}


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
    widened(module.to(torch.float64), 11)
    if getattr(module, "reference", None) is not None:
        widened(module.reference.network.to(torch.float64), 12)
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
    if getattr(module, "reference", None) is not None:
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
