"""Scores of tokens against distributions that are written out; their gradient against autograd's, number by number."""

import math

import pytest
import torch

from rlhf_lightning.functional.logprobs import entropy, log_softmax
from rlhf_lightning.functional.token_scores import logit_gradient, token_scores

LOGITS = torch.tensor([[0.0, math.log(2), math.log(5)], [1.0, 1.0, 1.0]])


def test_by_hand():
    scores, log_probs = token_scores(LOGITS, torch.tensor([1, 0]), temperature=1.0)
    torch.testing.assert_close(scores.logprobs, torch.tensor([0.25, 1 / 3]).log())
    by_hand = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    torch.testing.assert_close(scores.entropy, torch.tensor([by_hand, math.log(3)]))
    assert scores.greedy.tolist() == [False, True]  # in the second row no token is more likely
    torch.testing.assert_close(scores.mean_logit, LOGITS.mean(1))
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(2))


def test_by_the_plain_functions_at_a_temperature():
    logits, tokens = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 6, 3, 3, 1])
    scores, _ = token_scores(logits, tokens, temperature=0.6)
    known = log_softmax(logits, 0.6)
    torch.testing.assert_close(scores.logprobs, known.gather(1, tokens[:, None])[:, 0])
    torch.testing.assert_close(scores.entropy, entropy(known))
    assert scores.greedy.tolist() == (logits.argmax(1) == tokens).tolist()
    torch.testing.assert_close(scores.mean_logit, logits.mean(1))


def test_the_chance_that_two_draws_agree_is_computed_when_asked_for():
    scores, _ = token_scores(LOGITS, torch.tensor([1, 0]), temperature=1.0, collisions=True)
    torch.testing.assert_close(scores.collisions, torch.tensor([(1 + 4 + 25) / 64, 1 / 3]).log())
    warm, _ = token_scores(LOGITS, torch.tensor([1, 0]), temperature=2.0, collisions=True)
    by_hand = (1 + 2 + 5) / (1 + math.sqrt(2) + math.sqrt(5)) ** 2
    torch.testing.assert_close(warm.collisions, torch.tensor([by_hand, 1 / 3]).log())
    assert token_scores(LOGITS, torch.tensor([1, 0]), temperature=1.0)[0].collisions is None


def test_half_precision_is_widened_first_and_double_stays():
    logits, tokens = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)) * 3, torch.arange(4)
    half, _ = token_scores(logits.bfloat16(), tokens, temperature=1.0)
    assert half.logprobs.dtype == torch.float32
    wide = torch.log_softmax(logits.bfloat16().double(), -1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(half.logprobs.double(), wide, atol=1e-6, rtol=0)
    assert token_scores(logits.double(), tokens, temperature=1.0)[0].logprobs.dtype == torch.float64


def test_a_logit_of_minus_infinity_is_no_surprise_and_has_no_gradient():
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    scores, log_probs = token_scores(logits, torch.tensor([0]), temperature=1.0)
    torch.testing.assert_close(scores.entropy, torch.tensor([math.log(2)]))
    one = torch.ones(1)
    gradient = logit_gradient(log_probs, torch.tensor([0]), one, scores.entropy, one, temperature=1.0)
    torch.testing.assert_close(gradient, torch.tensor([[0.5, -0.5, 0.0]]))


def test_greedy_decoding_has_no_distribution():
    with pytest.raises(ValueError, match="temperature must be positive, not 0"):
        token_scores(LOGITS, torch.tensor([0, 0]), temperature=0.0)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradient_is_autograds(with_entropy, temperature):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 9, dtype=torch.float64, generator=generator, requires_grad=True)
    tokens = torch.randint(9, (6,), generator=generator)
    of_logprob, of_entropy = torch.randn(2, 6, dtype=torch.float64, generator=generator)
    known = torch.log_softmax(logits / temperature, -1)
    loss = (of_logprob * known.gather(1, tokens[:, None])[:, 0]).sum()
    if with_entropy:
        loss = loss - (of_entropy * (known.exp() * known).sum(-1)).sum()
    loss.backward()
    scores, log_probs = token_scores(logits.detach(), tokens, temperature=temperature)
    given = of_entropy if with_entropy else None
    gradient = logit_gradient(log_probs, tokens, of_logprob, scores.entropy, given, temperature=temperature)
    torch.testing.assert_close(gradient, logits.grad)
    assert gradient.data_ptr() == log_probs.data_ptr()  # no second tensor of this size
