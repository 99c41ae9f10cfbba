"""Log-probabilities against a float64 loop, entropy against torch.distributions, response masks by hand."""

import math

import pytest
import torch

from rlhf_lightning.functional.language_model import nll_loss
from rlhf_lightning.functional.logprobs import (
    entropy,
    log_softmax,
    response_mask_from_tokens,
    sequence_logprobs,
)


def logprobs_by_definition(logits, temperature):
    scaled = [float(z) / temperature for z in logits]
    top = max(scaled)
    return [z - top - math.log(sum(math.exp(other - top) for other in scaled)) for z in scaled]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_log_softmax_is_the_log_of_the_softmax(temperature, dtype):
    logits = (3 * torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(0))).to(dtype)
    expected = [[logprobs_by_definition(logits[b, t], temperature) for t in range(4)] for b in range(2)]
    computed = log_softmax(logits, temperature)
    assert computed.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(computed.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_without_a_distribution_is_refused(temperature):
    with pytest.raises(ValueError, match=f"^temperature must be positive, not {temperature}$"):
        log_softmax(torch.zeros(3), temperature)


def test_entropy_is_that_of_torch_distributions():
    logits = 2 * torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(1))
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy(logits.log_softmax(-1)), expected)


def test_impossible_tokens_add_nothing_to_the_entropy():
    half = math.log(0.5)
    assert entropy(torch.tensor([half, -torch.inf, half])).item() == pytest.approx(math.log(2))
    assert entropy(torch.tensor([0.0, -torch.inf])).item() == 0.0


def test_a_response_is_as_likely_as_the_product_of_its_counted_tokens():
    p = torch.tensor([[0.5, 0.2, 0.1], [0.25, 0.9, 0.9]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    torch.testing.assert_close(sequence_logprobs(p.log(), mask).exp(), torch.tensor([0.01, 0.25]))


def test_zero_logits_cost_log_vocabulary_a_token():
    tokens = torch.randint(37, (3, 5), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(5) < torch.tensor([5, 1, 3])[:, None]
    losses = nll_loss(log_softmax(torch.zeros(3, 5, 37), 1.0).gather(-1, tokens[..., None]).squeeze(-1), mask)
    torch.testing.assert_close(losses, math.log(37) * torch.tensor([5.0, 1.0, 3.0]))


def test_the_token_mean_is_not_the_mean_of_micro_batch_means():
    """10 and 6 tokens at 1 and 2 nats: 22 / 16 whether in one batch or two; the mean of means would be 1.5."""
    logprobs = -torch.tensor([[1.0] * 10, [2.0] * 10])
    mask = torch.arange(10) < torch.tensor([10, 6])[:, None]
    assert nll_loss(logprobs, mask).tolist() == [10, 12]
    assert (nll_loss(logprobs, mask).sum() / mask.sum()).item() == 22 / 16


def test_what_counts_is_everything_up_to_and_including_the_first_eos():
    responses = torch.tensor([[5, 6, 2, 2, 7], [5, 6, 7, 8, 9], [3, 5, 2, 5, 5], [5, 5, 5, 5, 2], [2, 0, 0, 0, 0]])
    mask, truncated = response_mask_from_tokens(responses, torch.tensor([2, 3]))
    assert mask.sum(1).tolist() == [3, 5, 1, 5, 1]
    assert torch.equal(mask, torch.arange(5) < torch.tensor([3, 5, 1, 5, 1])[:, None])
    assert truncated.tolist() == [False, True, False, False, False]
