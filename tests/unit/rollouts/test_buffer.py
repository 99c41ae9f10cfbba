"""The rollout buffer: rows stay together through shuffling, splitting and trimming."""

from dataclasses import fields

import pytest
import torch

from rlhf_lightning.rollouts.buffer import Rollout

PROMPTS = torch.tensor([2, 4, 1, 3, 2, 4, 3])
RESPONSES = torch.tensor([3, 1, 5, 2, 4, 2, 1])
P, T, N = 6, 7, 7  # one prompt column and two response columns hold nothing in any row, and one more


@pytest.fixture
def rollout():
    """Row b, column t of every tensor holds 100 b + t (+ 0.5 for its place among the fields)."""
    columns = torch.arange(P + T)
    attention = (columns >= (P - PROMPTS)[:, None]) & (columns < (P + RESPONSES)[:, None])
    response = torch.arange(T) < RESPONSES[:, None]
    ids = (100 * torch.arange(N)[:, None] + columns).masked_fill(~attention, -1)
    per_token = [
        (100.0 * torch.arange(N)[:, None] + torch.arange(P, P + T) + k / 10).masked_fill(~response, 0) for k in range(6)
    ]
    return Rollout(
        ids,
        attention,
        attention & (columns >= P),
        response,
        torch.arange(N) % 2 == 0,
        *per_token[:4],
        100.0 * torch.arange(N),
        torch.arange(N),
        torch.zeros(N),
        *per_token[4:],
    )


def content(rollout):
    """For each row: its number, the sorted ids of its real tokens, and every value that stands beside a response token."""
    found = {}
    for b in range(len(rollout)):
        row = int(rollout.scores[b]) // 100
        keep = rollout.response_mask[b]
        width = rollout.response_mask.shape[1]
        assert torch.equal(rollout.sequence_mask[b, -width:], keep)
        assert not rollout.sequence_mask[b, :-width].any()
        assert bool(rollout.truncated[b]) == (row % 2 == 0)
        ids = rollout.input_ids[b][rollout.attention_mask[b]].tolist()
        responses = rollout.input_ids[b, -width:][keep].tolist()
        values = {
            name: getattr(rollout, name)[b][keep].sub(torch.tensor(responses)).unique().tolist()
            for name in ("logprobs", "ref_logprobs", "entropy", "values", "advantages", "returns")
        }
        found[row] = (ids, responses, values)
    return found


def assert_whole(found):
    assert sorted(found) == list(range(N))
    for row, (ids, responses, values) in found.items():
        first = 100 * row + P - int(PROMPTS[row])
        assert ids == list(range(first, 100 * row + P + int(RESPONSES[row])))
        assert responses == ids[int(PROMPTS[row]) :]
        for k, offsets in enumerate(values.values()):
            assert offsets == pytest.approx([k / 10] * len(offsets), abs=1e-3)


def test_the_fixture_itself_is_whole(rollout):
    assert_whole(content(rollout))


def test_trimming_takes_away_empty_columns_only(rollout):
    trimmed = rollout.trimmed()
    assert trimmed.input_ids.shape == (N, 4 + 5)
    assert trimmed.logprobs.shape == trimmed.response_mask.shape == (N, 5)
    assert_whole(content(trimmed))
    again = trimmed.trimmed()
    assert all(torch.equal(getattr(trimmed, f.name), getattr(again, f.name)) for f in fields(Rollout))


def test_a_row_is_trimmed_to_its_own_width(rollout):
    for b, one in enumerate(rollout.micro_batches(1)):
        assert one.input_ids.shape == (1, PROMPTS[b] + RESPONSES[b])
        assert one.returns.shape == (1, RESPONSES[b])
        assert one.attention_mask.all()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10])
def test_minibatches_hold_every_row_once_and_whole(rollout, size):
    parts = list(rollout.minibatches(size, torch.Generator().manual_seed(0)))
    assert [len(part) for part in parts] == [size] * (N // size) + [N % size] * (N % size > 0)
    found = [content(part) for part in parts]
    assert sum(map(len, found)) == N
    assert_whole({row: c for part in found for row, c in part.items()})


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10])
def test_micro_batches_hold_every_row_once_in_order(rollout, size):
    found = [content(part) for part in rollout.micro_batches(size)]
    assert [row for part in found for row in part] == list(range(N))
    assert_whole({row: c for part in found for row, c in part.items()})


def test_each_epoch_has_its_own_order_that_the_generator_decides(rollout):
    def order(generator):
        return torch.cat([part.scores for part in rollout.minibatches(2, generator)]).tolist()

    generator = torch.Generator().manual_seed(5)
    first, second = order(generator), order(generator)
    assert first != second
    assert first != sorted(first)
    assert order(torch.Generator().manual_seed(5)) == first


def test_advantages_and_returns_go_where_they_belong(rollout):
    filled = rollout.with_advantages(torch.full((N, T), 3.0), torch.full((N, T), 4.0))
    assert filled.advantages.eq(3).all()
    assert filled.returns.eq(4).all()
    assert filled.values is rollout.values
