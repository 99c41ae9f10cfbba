"""Rankings of several responses: hand values, slow loops over explicit pairs and orders, gradients, ties."""

import math
from itertools import combinations, permutations

import pytest
import torch

from rlhf_lightning.functional.listwise import kendall_tau, ordered_pairs, pair_shares, plackett_luce_loss
from rlhf_lightning.functional.ranking import bradley_terry_loss

SCORES = torch.tensor([2.0, 1.0, 0.0, -1.0])
FIRST = torch.zeros(4, dtype=torch.long)
# Three prompts of 4, 2 and 3 responses, in no order; the first two of the last are tied.
MIXED = torch.tensor([0.3, -1.2, 0.8, 2.0, 0.5, 0.4, -0.7, 1.1, 0.0], dtype=torch.float64)
RANKS = torch.tensor([2.0, 0.0, 3.0, 1.0, 1.0, 0.0, 5.0, 5.0, 7.0])
PROMPT = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])


def explicit_pairs():
    """Of each prompt the pairs (better, worse), by a loop."""
    found = {0: [], 1: [], 2: []}
    for i, j in combinations(range(9), 2):
        if PROMPT[i] == PROMPT[j] and RANKS[i] != RANKS[j]:
            found[int(PROMPT[i])].append((i, j) if RANKS[i] < RANKS[j] else (j, i))
    return found


def k_wise(scores, ranks, prompt):
    better, worse = ordered_pairs(ranks, prompt)
    return (pair_shares(prompt[better]) * bradley_terry_loss(scores[better], scores[worse])).sum()


def test_k_wise_by_hand():
    assert k_wise(SCORES, torch.arange(4), FIRST).item() == pytest.approx(0.207038, abs=1e-6)
    assert k_wise(torch.zeros(4), torch.arange(4), FIRST).item() == pytest.approx(math.log(2), abs=1e-6)


def test_every_two_that_are_told_apart_are_a_pair_and_no_two_of_different_prompts():
    better, worse = ordered_pairs(RANKS, PROMPT)
    expected = sorted(pair for pairs in explicit_pairs().values() for pair in pairs)
    assert len(expected) == 6 + 1 + 2
    assert sorted(zip(better.tolist(), worse.tolist(), strict=True)) == expected


def test_k_wise_loss_and_gradient_are_those_of_the_explicit_pairs():
    scores = MIXED.clone().requires_grad_()
    expected = sum(
        sum(-torch.nn.functional.logsigmoid(scores[i] - scores[j]) for i, j in pairs) / len(pairs)
        for pairs in explicit_pairs().values()
    )
    (slow,) = torch.autograd.grad(expected, scores)
    fast = k_wise(scores, RANKS, PROMPT)
    torch.testing.assert_close(fast, expected)
    torch.testing.assert_close(torch.autograd.grad(fast, scores)[0], slow)


def test_plackett_luce_by_hand():
    ranks = torch.arange(4)
    assert plackett_luce_loss(SCORES, ranks, FIRST, prompts=1).item() == pytest.approx(1.161057, abs=1e-6)
    assert plackett_luce_loss(torch.zeros(4), ranks, FIRST, prompts=1).item() == pytest.approx(math.log(24), abs=1e-6)


def test_plackett_luce_of_two_is_bradley_terry():
    scores, ranks = torch.tensor([0.3, 1.7, -2.0, 0.1]), torch.tensor([1.0, 0.0, 3.0, 8.0])
    found = plackett_luce_loss(scores, ranks, torch.tensor([0, 0, 1, 1]), prompts=2)
    torch.testing.assert_close(found, bradley_terry_loss(scores[[1, 2]], scores[[0, 3]]))


def test_the_likelihoods_of_all_orders_of_four_sum_to_one():
    scores = torch.tensor([0.7, -0.4, 1.9, 0.2], dtype=torch.float64)
    losses = [plackett_luce_loss(scores, torch.tensor(order), FIRST, prompts=1) for order in permutations(range(4))]
    assert torch.exp(-torch.stack(losses)).sum().item() == pytest.approx(1, abs=1e-12)


def test_plackett_luce_by_a_loop_with_ties_left_out_of_each_others_terms():
    expected = []
    for prompt in range(3):
        own = [i for i in range(9) if PROMPT[i] == prompt]
        terms = []
        for i in own:
            worse = [math.exp(MIXED[j]) for j in own if RANKS[j] > RANKS[i]]
            terms.append(math.log(math.exp(MIXED[i]) + sum(worse)) - MIXED[i])
        expected.append(sum(terms))
    found = plackett_luce_loss(MIXED, RANKS, PROMPT, prompts=3)
    assert found.tolist() == pytest.approx([float(x) for x in expected], abs=1e-12)


def test_rankings_see_differences_only():
    shifted = MIXED + torch.tensor([3.0, -5.0, 0.5], dtype=torch.float64)[PROMPT]
    torch.testing.assert_close(k_wise(shifted, RANKS, PROMPT), k_wise(MIXED, RANKS, PROMPT))
    both = [plackett_luce_loss(scores, RANKS, PROMPT, prompts=3) for scores in (shifted, MIXED)]
    torch.testing.assert_close(*both)
    scores = MIXED.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(plackett_luce_loss(scores, RANKS, PROMPT, prompts=3).sum(), scores)
    torch.testing.assert_close(torch.zeros(3).double().index_add(0, PROMPT, gradient), torch.zeros(3).double())


@pytest.mark.parametrize("k", [2, 5])
def test_kendall_tau_of_every_order(k):
    """Against the number of neighbours that have to change places: tau = 1 - 4 inversions / (k (k - 1))."""
    ranks, prompt = torch.arange(k), torch.zeros(k, dtype=torch.long)
    for order in permutations(range(k)):
        inversions = sum(order[i] > order[j] for i, j in combinations(range(k), 2))
        found = kendall_tau(-torch.tensor(order).float(), ranks, prompt, prompts=1)
        assert found.item() == pytest.approx(1 - 4 * inversions / (k * (k - 1)), abs=1e-6)


def test_kendall_tau_is_of_each_prompt_and_leaves_ties_out():
    """Of the third prompt two pairs count; one score is equal to another, which is neither right nor wrong."""
    scores = torch.tensor([0.0, 1.0, 2.0, 3.0, 1.0, 0.0, 5.0, 1.0, 1.0])
    pairs = explicit_pairs()
    expected = [
        sum((scores[i] > scores[j]) * 1 - (scores[i] < scores[j]) * 1 for i, j in p) / len(p) for p in pairs.values()
    ]
    found = kendall_tau(scores, RANKS, PROMPT, prompts=3)
    assert found.tolist() == pytest.approx([float(x) for x in expected])
    assert found.tolist()[1:] == [-1.0, 0.5]
