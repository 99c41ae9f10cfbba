"""Rollouts whose responses have holes: columns are cut and advantages estimated as if the masked tokens were not there."""

from dataclasses import fields, replace

import pytest
import torch

from rlhf_lightning.generation.engine import Generation
from rlhf_lightning.rollouts.advantages import GAE
from rlhf_lightning.rollouts.buffer import Rollout
from rlhf_lightning.rollouts.group_advantages import BatchMean, GroupMean, LeaveOneOut, ReturnToGo
from rlhf_lightning.rollouts.mismatch import Importance, differences, weighed

ROWS, PROMPT, LENGTH = 6, 4, 8


def rollout(seed):
    """Random numbers, prompts of uneven length, responses with holes anywhere."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(ROWS, LENGTH, generator=generator) < 0.4
    mask[torch.arange(ROWS), torch.randint(LENGTH, (ROWS,), generator=generator)] = True
    lengths = torch.randint(1, PROMPT + 1, (ROWS,), generator=generator)
    prompt = torch.arange(PROMPT) >= PROMPT - lengths[:, None]
    real = mask.flip(1).cumsum(1).flip(1) > 0  # a token follows, or is one: tools' words are read, not learnt from
    numbers = torch.randn(6, ROWS, LENGTH, generator=generator).masked_fill(~mask, 0)
    return Rollout(
        input_ids=torch.randint(50, (ROWS, PROMPT + LENGTH), generator=generator),
        attention_mask=torch.cat([prompt, real], dim=1),
        sequence_mask=torch.cat([torch.zeros_like(prompt), mask], dim=1),
        response_mask=mask,
        truncated=torch.arange(ROWS) % 3 == 0,
        logprobs=numbers[0],
        ref_logprobs=numbers[1],
        entropy=numbers[2],
        values=numbers[3],
        scores=torch.randn(ROWS, generator=generator),
        groups=torch.arange(ROWS) // 2,
        baselines=torch.randn(ROWS, generator=generator),
        advantages=numbers[4],
        returns=numbers[5],
    )


def without_holes(full):
    """The same responses with what is masked taken out."""
    mask = full.response_mask
    order = (~mask).long().argsort(dim=1, stable=True)
    per_token = ("logprobs", "ref_logprobs", "entropy", "values", "advantages", "returns", "response_mask")
    return replace(full, **{name: getattr(full, name).gather(1, order) for name in per_token})


@pytest.mark.parametrize(
    "estimator",
    [
        GAE(gamma=0.9, gae_lambda=0.8, whiten_rewards=True),
        GAE(whiten_advantages=False),
        GroupMean(),
        LeaveOneOut(),
        BatchMean(),
        ReturnToGo(),
        ReturnToGo(group_baseline=True, whiten=False),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_advantages_are_those_of_the_tokens_that_count(estimator):
    for seed in range(20):
        full = rollout(seed)
        dense = without_holes(full)
        found, expected = (estimator.estimate(x, kl_coef=0.2, all_sum=lambda x: x) for x in (full, dense))
        for name in ("advantages", "returns"):
            values = getattr(found, name)
            assert (values[~full.response_mask] == 0).all()
            torch.testing.assert_close(
                values[full.response_mask], getattr(expected, name)[dense.response_mask], rtol=1e-4, atol=1e-5
            )


def test_trimming_drops_no_token_that_counts():
    for seed in range(60):
        full = rollout(seed)
        for part in (full, *full.micro_batches(2), full.rows(torch.tensor([seed % ROWS]))):
            cut = part.trimmed()
            width = cut.response_mask.shape[1]
            assert cut.response_mask[:, -1].any()
            assert torch.equal(cut.sequence_mask[:, -width:], cut.response_mask)
            for f in fields(Rollout):
                before, after = getattr(part, f.name), getattr(cut, f.name)
                if before.dim() == 2 and f.name not in ("input_ids", "attention_mask", "sequence_mask"):
                    assert torch.equal(before[part.response_mask], after[cut.response_mask]), f.name
            assert torch.equal(part.input_ids[part.sequence_mask], cut.input_ids[cut.sequence_mask])


def test_the_right_edge_is_the_last_token_that_counts_not_their_number():
    full = rollout(0)
    mask = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    mask[:, [0, 6]] = True
    full = replace(full, response_mask=mask)
    assert full.trimmed().response_mask.shape == (ROWS, 7)


def test_rows_in_which_no_token_counts_keep_a_column():
    """Slices from the end, ``x[:, -width:]``, would otherwise be everything."""
    full = rollout(0)
    empty = replace(full, response_mask=torch.zeros_like(full.response_mask)).trimmed()
    assert empty.response_mask.shape == empty.logprobs.shape == (ROWS, 1)


def test_a_mismatch_over_rows_in_which_no_token_counts_is_nothing():
    full = rollout(0)
    none = torch.zeros_like(full.response_mask)
    assert differences(full.logprobs, full.ref_logprobs, none) == {}
    empty = replace(full, response_mask=none)
    _, counted = weighed(empty, Generation(full.input_ids, full.ref_logprobs), Importance())
    assert counted == {}
