"""Ranks whose rows and responses differ do the same number of things that wait for each other: else they wait for ever."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from rlhf_lightning.data.collate import PlannedRows, PromptCollator
from rlhf_lightning.data.sampler import BatchPlan
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.generation.transformers_engine import TransformersEngine
from rlhf_lightning.losses import PPOLoss
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.models.sharding import is_sharded
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import PPOModule, RewardModelModule, reward_model
from rlhf_lightning.modules.optimization import Schedule
from rlhf_lightning.modules.ppo import PPOUpdate
from rlhf_lightning.rewards.reward_model import RewardModelReward
from tests.gloo import on_ranks
from tests.invariance.rearrangements import PAD
from tests.invariance.subjects import ARCHITECTURES, PROMPT_ROWS, sgd, tokenizer

# ---------------------------------------------------------------- the normalisation of a reward model


def forwards(monkeypatch, sizes):
    """How many batches a rank of two takes, of these pairs each, when 16 responses are to be measured."""
    monkeypatch.setattr(reward_model, "MEASURED", 16)
    module: Any = RewardModelModule(ModelSpec(architecture=ARCHITECTURES["rotary"]))
    module.network = SimpleNamespace(normalise=lambda mean, std: None)
    taken = []
    module.forward = lambda batch: taken.append(batch) or torch.arange(2.0 * batch)
    module.transfer_batch_to_device = lambda batch, *_: batch
    datamodule = SimpleNamespace(batch_size=2, scored_batches=lambda name: iter(sizes))
    strategy = SimpleNamespace(reduce=lambda moments, reduce_op: moments)
    module._trainer = SimpleNamespace(datamodule=datamodule, world_size=2, strategy=strategy)
    module._normalise()
    return len(taken)


def test_ranks_measure_equally_many_batches_of_scores(monkeypatch):
    """The second rank's are a row short, and so it had not seen enough when the first had."""
    assert forwards(monkeypatch, [2, 2, 2, 2]) == forwards(monkeypatch, [2, 1, 2, 2]) == 2


# ---------------------------------------------------------------- rollouts of other lengths


def ppo(base):
    """A policy whose answers end at any length, with a critic and a reward model from a folder."""
    scalar = str(Path(base, "scalar"))
    return PPOModule(
        ModelSpec(architecture=ARCHITECTURES["rotary"]),
        ModelSpec(path=scalar),
        RewardModelReward(scalar, batch_size=2),
        sampling=SamplingParameters(max_new_tokens=24),
        loss=PPOLoss(),
        update=PPOUpdate(epochs=1, minibatch_size=2, micro_batch_size=1),
        optimizer=sgd(0.01),
        schedule=Schedule(decay="constant"),
    )


class Lengths(pl.Callback):
    """Keeps how long the answers of each iteration were, and how many forwards their scores took."""

    def __init__(self):
        self.longest, self.drawn = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        responses, _ = pl_module.last_rollout
        self.longest.append(int(responses.response_mask.sum(1).max()))
        self.drawn.append(responses.samples.completion_ids)


def iterations(rank, base, strategy, count, engine):
    """That many iterations on two ranks, of which one has a row more."""
    pl.seed_everything(0, verbose=False)
    module: Any = ppo(base)
    module.tokenizer = tokenizer()
    if engine == "transformers":
        module.engine = TransformersEngine()
    rows, mine = PlannedRows(Dataset.from_dict(PROMPT_ROWS)), [[0, 1, 2, 3], [0, 1, 2]][rank]
    lengths = Lengths()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=1,
        limit_train_batches=count,
        limit_val_batches=0,
        logger=False,
        callbacks=[lengths],
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches: Any = [PromptCollator(PAD)(rows.__getitems__(BatchPlan(mine, 1.0))) for _ in range(count)]
    trainer.fit(module, DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch))
    reward = module.reward.networks()[0]
    weights = [p.full_tensor() if strategy == "fsdp2" else p.detach() for p in module.parameters()]
    return {
        "steps": trainer.global_step,
        "longest": lengths.longest,
        "drawn": lengths.drawn,
        "sharded": is_sharded(module.actor_critic) and is_sharded(module.reference.network) and is_sharded(reward),
        "weights": [weight.clone() for weight in weights],
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scalar")
    torch.manual_seed(2)
    network = load_scalar_model(ModelSpec(architecture=ARCHITECTURES["rotary"]), tokenizer(), new_head=True)
    export_folder(network, tokenizer(), folder / "scalar")
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "engine", "count"),
    [
        ("fsdp2", "native", 10),
        pytest.param("fsdp2", "native", 200, marks=pytest.mark.exhaustive),
        pytest.param("fsdp2", "transformers", 200, marks=pytest.mark.exhaustive),
        pytest.param("ddp", "native", 200, marks=pytest.mark.exhaustive),
    ],
)
def test_answers_of_unequal_length_on_two_ranks_hang_nobody(base, tmp_path, strategy, engine, count):
    first, second = on_ranks(iterations, tmp_path / "ranks", base, strategy, count, engine, timeout=500)
    assert first["steps"] == second["steps"] == 2 * count
    assert len(first["longest"]) == len(second["longest"]) == count
    unequal = sum(one != other for one, other in zip(first["longest"], second["longest"], strict=True))
    assert unequal > 0.2 * count
    begun = [[ids[0] for ids in rank["drawn"][0][:3]] for rank in (first, second)]
    assert begun[0] != begun[1]  # the same prompts: each rank draws numbers of its own
    assert first["sharded"] == second["sharded"] == (strategy == "fsdp2")
    for one, other in zip(first["weights"], second["weights"], strict=True):
        assert torch.equal(one, other)
