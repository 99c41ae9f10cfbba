"""Reference log-probabilities are kept under a key of everything that they depend on, and of nothing else."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from rlhf_lightning.models.frozen import Frozen
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import reference_logps
from rlhf_lightning.worlds import world_tokenizer

ROWS = {"prompt_ids": [[1], [1, 2]], "chosen_ids": [[3], [4, 5]], "rejected_ids": [[6], [7]], "length": [2, 4]}


@pytest.fixture
def computed(tmp_path, monkeypatch):
    """Computes what is not kept yet, and counts how often."""
    monkeypatch.setenv("RLHF_LIGHTNING_CACHE", str(tmp_path))
    monkeypatch.setattr(reference_logps, "place_reference", lambda module, reference: None)
    calls = []

    def compute(module, reference, rows):
        calls.append(len(rows))
        return torch.arange(2.0 * len(rows)).view(-1, 2) - 9

    monkeypatch.setattr(reference_logps, "compute", compute)
    return calls


def add(network, rows=ROWS, precision="32-true", **data):
    strategy = SimpleNamespace(broadcast=lambda x: x, reduce_boolean_decision=lambda x, all: x)
    datamodule = SimpleNamespace(rows={"train": Dataset.from_dict(rows)}, fingerprint=dict, **data)
    trainer = SimpleNamespace(datamodule=datamodule, strategy=strategy, precision=precision, is_global_zero=True)
    reference_logps.add_reference_logps(SimpleNamespace(trainer=trainer), Frozen(PolicyNetwork(network)))
    return [datamodule.rows["train"][name] for name in reference_logps.REFERENCE_COLUMNS]


def built(tiny, **changes):
    torch.manual_seed(0)
    return load_causal_lm(ModelSpec(architecture=tiny | changes), world_tokenizer())


def test_each_part_of_the_key(tiny, computed):
    network = built(tiny)
    assert add(network) == [[-9, -7], [-8, -6]]
    assert add(built(tiny), batch_size=7, num_workers=2) == [[-9, -7], [-8, -6]]
    assert computed == [2]
    add(network, precision="bf16-mixed")
    for name in ROWS:
        if name != "length":
            add(network, ROWS | {name: [ROWS[name][0], [*ROWS[name][1], 8]]})
    add(network, {name: values[::-1] for name, values in ROWS.items()})
    other = built(tiny, rms_norm_eps=0.1)  # the same weights, which compute otherwise
    assert all(torch.equal(*both) for both in zip(network.parameters(), other.parameters(), strict=True))
    add(other)
    add(built(tiny, num_attention_heads=4))
    with torch.no_grad():
        list(network.parameters())[-1][-1].add_(1e-3)
    add(network)
    assert computed == [2] * 9
