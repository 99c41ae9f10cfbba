"""Masked sums by hand, and garbage in the padding of every function that takes a mask."""

import pytest
import torch

from rlhf_lightning.functional.advantages import gae, whiten
from rlhf_lightning.functional.groups import rewards_to_go
from rlhf_lightning.functional.language_model import nll_loss
from rlhf_lightning.functional.logprobs import sequence_logprobs
from rlhf_lightning.functional.masked import last_true, masked_sum
from rlhf_lightning.functional.policy import (
    cispo_loss,
    clipped_policy_loss,
    clipped_sequence_loss,
    reinforce_loss,
)
from rlhf_lightning.functional.rewards import token_rewards
from rlhf_lightning.functional.value import clipped_value_loss, explained_variance

MASK = torch.tensor([[True, True, False, False], [False, True, True, True], [True, False, False, False]])
X = torch.tensor([[1.0, 2.0, 90.0, 91.0], [92.0, 4.0, 8.0, 16.0], [32.0, 93.0, 94.0, 95.0]])


def test_sums_are_those_of_the_counted_entries():
    assert masked_sum(X, MASK).item() == 63
    assert masked_sum(X, MASK).shape == ()
    assert masked_sum(X, MASK, dim=1).tolist() == [3, 28, 32]
    assert masked_sum(X, MASK, dim=0).tolist() == [33, 6, 8, 16]
    assert masked_sum(X, torch.zeros_like(MASK)).item() == 0


def test_last_true_is_found_with_padding_on_either_side_and_with_holes():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    assert last_true(mask).tolist() == [1, 3, 2, 0]


def test_a_row_without_any_true_is_named():
    with pytest.raises(ValueError, match=r"^rows \[1\] of the mask hold no True$"):
        last_true(torch.tensor([[True, False], [False, False]]))


def test_columns_are_counted_where_the_mask_lies():
    mask = torch.tensor([[True, False], [True, True]])
    with torch.device("meta"):  # where new tensors go that are not told otherwise
        assert last_true(mask).tolist() == [0, 1]


BOUNDS = {"clip_low": 0.2, "clip_high": 0.2}
SCORES = torch.tensor([1.0, -2.0, 0.5])
FUNCTIONS = {
    "masked_sum": (1, lambda m, x: masked_sum(x, m)),
    "masked_sum of rows": (1, lambda m, x: masked_sum(x, m, dim=1)),
    "nll_loss": (1, lambda m, x: nll_loss(x, m)),
    "sequence_logprobs": (1, lambda m, x: sequence_logprobs(x, m)),
    "whiten": (1, lambda m, x: whiten(x, m)),
    "whiten, mean kept": (1, lambda m, x: whiten(x, m, keep_mean=True)),
    "gae advantages": (2, lambda m, r, v: gae(r, v, m, gamma=0.9, gae_lambda=0.8)[0]),
    "gae returns": (2, lambda m, r, v: gae(r, v, m, gamma=0.9, gae_lambda=0.8)[1]),
    "token_rewards": (2, lambda m, p, q: token_rewards(SCORES, p, q, m, kl_coef=0.1)),
    "clipped_policy_loss": (3, lambda m, p, q, a: clipped_policy_loss(p, q, a, m, **BOUNDS, ratio_cap=2.0).loss),
    "clipped_sequence_loss": (
        3,
        lambda m, p, q, a: clipped_sequence_loss(p, q, a, m, **BOUNDS, length_normalised=True).loss,
    ),
    "cispo_loss": (2, lambda m, p, a: cispo_loss(p, torch.zeros_like(p), a, m, ratio_cap=5.0).loss),
    "reinforce_loss": (2, lambda m, p, a: reinforce_loss(p, a, m).loss),
    "rewards_to_go": (1, lambda m, r: rewards_to_go(r, m)),
    "clipped_value_loss": (3, lambda m, v, o, r: clipped_value_loss(v, o, r, m, clip_range=0.2)[0]),
    "explained_variance": (2, lambda m, v, r: explained_variance(v, r, m)),
}
RIGHT_PADDED = torch.arange(5) < torch.tensor([2, 5, 3])[:, None]


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -1e30])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_garbage_in_masked_slots_changes_neither_value_nor_gradient(name, garbage):
    arguments, function = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(5)
    tensors = [torch.randn(3, 5, generator=generator) for _ in range(arguments)]

    def run(fill):
        leaves = [t.masked_fill(~RIGHT_PADDED, fill).requires_grad_() for t in tensors]
        out = function(RIGHT_PADDED, *leaves)
        weights = torch.linspace(0.5, 2.0, out.numel()).reshape(out.shape)  # else a whitened sum has no gradient at all
        return out.detach(), torch.autograd.grad((out * weights).sum(), leaves)

    (clean, clean_gradients), (dirty, dirty_gradients) = run(0.25), run(garbage)
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
    for clean_gradient, dirty_gradient in zip(clean_gradients, dirty_gradients, strict=True):
        torch.testing.assert_close(dirty_gradient, clean_gradient, rtol=0, atol=0)
        assert clean_gradient[RIGHT_PADDED].abs().max() > 0
        assert clean_gradient[~RIGHT_PADDED].eq(0).all()


def test_the_clip_flags_are_false_where_masked():
    far = torch.full((3, 5), 3.0)
    zero = torch.zeros(3, 5)
    assert torch.equal(clipped_policy_loss(far, zero, far, RIGHT_PADDED, **BOUNDS).high, RIGHT_PADDED)
    assert torch.equal(clipped_policy_loss(-far, zero, -far, RIGHT_PADDED, **BOUNDS).low, RIGHT_PADDED)
    assert torch.equal(cispo_loss(far, zero, far, RIGHT_PADDED, ratio_cap=2.0).high, RIGHT_PADDED)
    _, clipped = clipped_value_loss(far, zero, far, RIGHT_PADDED, clip_range=0.2)
    assert torch.equal(clipped, RIGHT_PADDED)
