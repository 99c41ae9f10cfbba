"""Rows of one prompt stay side by side with all their columns: in minibatches, in joined calls, and in pairs."""

from dataclasses import fields, replace

import pytest
import torch

from rlhf_lightning.generation.engine import Generation
from rlhf_lightning.losses import DPOLoss
from rlhf_lightning.models.policy import PolicyOutput
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import OnlineDPOModule
from rlhf_lightning.modules.grpo_update import Groups
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.rewards.reward import Samples
from rlhf_lightning.rollouts.buffer import Rollout, parts
from rlhf_lightning.rollouts.collect import Responses
from rlhf_lightning.rollouts.groups import joined, some_responses

SIZE, PROMPTS, WIDTH = 3, 5, 2
ROWS = SIZE * PROMPTS


def numbered(rows=ROWS):
    """Every number of row b is 100 b + the index of its field."""
    made = {}
    for index, field in enumerate(fields(Rollout)):
        per_row = field.name in ("truncated", "scores", "groups", "baselines")
        shape = (rows,) if per_row else (rows, WIDTH + 1 if field.name in ("input_ids", "sequence_mask") else WIDTH)
        row = 100 * torch.arange(rows).view(-1, *[1] * (len(shape) - 1))
        made[field.name] = (row + index).expand(shape)
    return Rollout(**made)


def rows_of(rollout):
    """The index of each row, the same in every column."""
    found = []
    for index, field in enumerate(fields(Rollout)):
        column = getattr(rollout, field.name)
        column = column.flatten(1)[:, :1].squeeze(1) if column.dim() > 1 else column
        found.append(((column - index) / 100).tolist())
    assert all(one == found[0] for one in found)
    return [int(row) for row in found[0]]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_minibatches_hold_groups_in_one_piece_and_in_their_order(groups):
    generator = torch.Generator().manual_seed(0)
    found = [rows_of(part) for part in numbered().minibatches(groups * SIZE, generator, together=SIZE)]
    assert [len(part) for part in found] == [groups * SIZE] * (PROMPTS // groups) + (
        [PROMPTS % groups * SIZE] if PROMPTS % groups else []
    )
    rows = [row for part in found for row in part]
    firsts = rows[::SIZE]
    assert rows == [first + i for first in firsts for i in range(SIZE)]
    assert sorted(firsts) == list(range(0, ROWS, SIZE))
    order = [first // SIZE for first in firsts]
    assert [order[index] for index in order] != list(range(PROMPTS))  # no order that is its own inverse


def test_the_last_of_fewer_batches_takes_what_is_left():
    rows = torch.tensor([4, 0, 3, 1, 6, 2, 5])
    assert [part.tolist() for part in parts(rows, 2, 3)] == [[4, 0], [3, 1], [6, 2, 5]]
    assert [part.tolist() for part in parts(rows, 2, 1)] == [rows.tolist()]


def call(number, rows, width):
    """The responses of one call; every column says call and row."""
    names = [f"{number}.{row}" for row in range(rows)]
    numbers = 10.0 * number + torch.arange(rows)
    lengths = 1 + torch.arange(rows) % width
    mask = torch.arange(width) < lengths[:, None]
    prompt, tokens = torch.ones(rows, 1, dtype=torch.bool), numbers[:, None].expand(rows, width).long()
    samples = Samples(
        names, [f"c{name}" for name in names], [[int(n)] for n in numbers], [row % 2 == number % 2 for row in range(rows)],
        {"answer": [f"a{name}" for name in names]}, {"note": [f"n{name}" for name in names]} if number else {},
    )  # fmt: skip
    return Responses(
        torch.cat([numbers[:, None].long(), tokens], 1),
        torch.cat([prompt, mask], 1),
        torch.cat([~prompt, mask], 1),
        mask,
        torch.tensor(samples.truncated),
        Generation(tokens, numbers[:, None] * mask, -numbers[:, None] * mask),
        samples,
    )


def test_calls_of_other_widths_are_joined_column_by_column():
    whole = joined([call(0, 2, 3), call(1, 4, 2), call(2, 3, 4)])
    picked = some_responses(whole, [8, 0, 5, 3], 4)
    for responses, order in ((whole, [0, 1, 10, 11, 12, 13, 20, 21, 22]), (picked, [22, 0, 13, 11])):
        names = [f"{n // 10}.{n % 10}" for n in order]
        samples, widths = responses.samples, {0: 3, 1: 2, 2: 4}
        assert samples.prompts == names
        assert samples.completions == [f"c{name}" for name in names]
        assert samples.completion_ids == [[n] for n in order]
        assert samples.truncated == responses.truncated.tolist() == [n % 2 == n // 10 % 2 for n in order]
        assert samples.columns == {"answer": [f"a{name}" for name in names]}
        assert samples.extra == {"note": [f"n{name}" if n > 9 else None for n, name in zip(order, names, strict=True)]}
        lengths = torch.tensor([1 + n % 10 % widths[n // 10] for n in order])
        mask = torch.arange(4) < lengths[:, None]
        assert torch.equal(responses.response_mask, mask)
        assert torch.equal(responses.attention_mask[:, 1:], mask)
        assert torch.equal(responses.sequence_mask[:, 1:], mask)
        numbers = torch.tensor(order)[:, None]
        assert torch.equal(responses.input_ids[:, :2], numbers.expand(-1, 2))
        assert torch.equal(responses.drawn.tokens[mask], numbers.expand(-1, 4)[mask])
        assert torch.equal(responses.drawn.logprobs, numbers * mask.float())
        assert torch.equal(responses.drawn.entropy, -numbers * mask.float())


def online(size):
    return OnlineDPOModule(ModelSpec(path="nowhere"), FunctionReward(len), DPOLoss(beta=0.5), Groups(size=size))


def test_a_pair_is_the_best_and_the_worst_of_its_own_group():
    scores = torch.tensor([[1.0, 5, 3, 2], [4, 4, 4, 4], [0, 1, 9, 8], [7, 6, 5, 9], [2, 1, 3, 3]]).flatten()
    truncated = torch.zeros(20, dtype=torch.bool)
    truncated[15] = True  # the 9 of the fourth group was cut off, which is worse than any end
    mask = torch.ones(20, WIDTH, dtype=torch.bool)
    rollout = replace(numbered(20), scores=scores, truncated=truncated, response_mask=mask)
    pairs = online(4)._paired(rollout)
    rows = (pairs.logprobs[:, 0] // 100).tolist()
    assert rows == [1, 0, 4, 4, 10, 8, 12, 15, 18, 17]
    assert pairs.scores.tolist() == [scores[row] for row in rows]
    assert pairs.groups.tolist() == [rollout.groups[row] for row in rows]
    assert pairs.advantages[:, 0].tolist() == [1, 1, 0, 0, 1, 1, 1, 1, 1, 1]


def test_the_loss_is_of_each_pair_and_leaves_ties_out():
    """Three pairs, of which the second ties: -log sigmoid(beta (log-ratio of the chosen - that of the rejected))."""
    module = online(2)
    own = torch.tensor([-1.0, -7.0, -2.0, -3.0, -4.0, -1.5])
    reference = torch.tensor([-2.0, -3.0, -5.0, -1.0, -2.5, -4.0])
    width = torch.arange(6)
    made = numbered(6)
    pairs = replace(
        made,
        response_mask=torch.ones(6, 1, dtype=torch.bool),
        logprobs=own[:, None],
        ref_logprobs=reference[:, None],
        scores=torch.tensor([5.0, 1.0, 2.0, 2.0, 4.0, 3.0]),
        advantages=torch.tensor([1.0, 1, 0, 0, 1, 1])[:, None],
    )
    module._scored = lambda *_: PolicyOutput(*[own[width][:, None]] * len(PolicyOutput._fields))
    module._reference_logprobs = lambda rows: rows.ref_logprobs
    leads = torch.tensor([(1.0) - (-4.0), (-1.5) - 2.5])
    assert float(module._micro_loss(pairs)) == pytest.approx(float(-torch.nn.functional.logsigmoid(0.5 * leads).sum()))
    counted = module.update_means.compute()
    assert float(counted["objective/scores_margin"]) == pytest.approx(2.5)  # 4 and 1
    assert float(counted["logps/chosen"]) == pytest.approx(-2.5)
    assert float(counted["logps/rejected"]) == pytest.approx(-4.25)
    assert float(counted["rewards/accuracies"]) == 0.5
