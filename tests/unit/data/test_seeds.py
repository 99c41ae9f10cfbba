"""No two seeds, ranks, batches or splits share random numbers."""

import sys
from types import SimpleNamespace

import pytest
import torch

from rlhf_lightning.data.seeds import mixed_seed
from rlhf_lightning.modules.online import begin, validation_seed
from rlhf_lightning.rewards import reasoning


def first_numbers(seed, rank):
    torch.manual_seed(seed)
    begin(SimpleNamespace(trainer=SimpleNamespace(precision="32-true", world_size=4), global_rank=rank))
    return tuple(torch.rand(4).tolist())


def test_no_rank_of_a_seed_draws_what_a_rank_of_another_seed_draws():
    drawn = {(seed, rank): first_numbers(seed, rank) for seed in range(6) for rank in range(4)}
    assert len(set(drawn.values())) == len(drawn)
    torch.manual_seed(3)
    assert drawn[3, 0] == tuple(torch.rand(4).tolist())  # the first rank is the run on one rank


def test_ranks_validate_with_other_noise_than_each_other():
    seeds = {validation_seed(number, rank) for number in range(8) for rank in range(8)}
    assert len(seeds) == 64
    assert [validation_seed(number, 0) for number in range(3)] == [0, 1, 2]


def test_mixed_seeds_are_the_same_in_every_process_and_fit_torch():
    assert mixed_seed("rank", 0, 1) == 853108786945526892
    assert mixed_seed(1, 23) != mixed_seed(12, 3)
    torch.manual_seed(mixed_seed(0, 0))


@pytest.mark.parametrize("seed", [0, 7])
def test_tasks_of_reasoning_gym_with_neighbouring_seeds_share_no_rows(monkeypatch, seed):
    """The library draws row i of a task from its seed plus i."""
    asked = []

    def create_dataset(name, seed, size):
        asked.append(range(seed, seed + size))
        return [{"question": str(number), "answer": str(number)} for number in asked[-1]]

    monkeypatch.setattr(reasoning, "installed", lambda name: None)
    monkeypatch.setitem(sys.modules, "reasoning_gym", SimpleNamespace(create_dataset=create_dataset))
    for own in (seed, seed + 1):
        reasoning.ReasoningGymSource({"chain_sum": {}}, size=50, validation=20, seed=own).load("prompts")
    rows = [number for numbers in asked for number in numbers]
    assert len(rows) == len(set(rows)) == 140
    assert max(rows) < 2**31
