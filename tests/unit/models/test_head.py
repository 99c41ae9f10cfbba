"""The head in chunks: the numbers and gradients of the whole, and the memory of a chunk."""

import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_lightning.models import head
from rlhf_lightning.models.head import head_scores

POSITIONS = 23


def network(vocabulary=50, hidden=16):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def inputs(vocabulary=50, hidden=16):
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(POSITIONS, hidden, generator=generator)
    return states, torch.randint(vocabulary, (POSITIONS,), generator=generator)


def by_autograd(model, states, tokens, temperature):
    known = torch.log_softmax(model.lm_head(states).float() / temperature, -1)
    return known.gather(1, tokens[:, None])[:, 0], -(known.exp() * known).sum(-1)


def gradients(model, states, logprobs, entropy, weights):
    model.zero_grad()
    loss = (weights * logprobs).sum() + 0.3 * entropy.sum()
    return [g.clone() for g in torch.autograd.grad(loss, [states, model.lm_head.weight])]


@pytest.mark.parametrize("rows", [1, 5, 22, 23, 100])
@pytest.mark.parametrize("kept", [0, 10, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_give_the_whole_gradient(monkeypatch, rows, kept, temperature):
    monkeypatch.setitem(head.CHUNK, "cpu", rows * 50)
    monkeypatch.setitem(head.KEPT, "cpu", kept * 50)
    model, (states, tokens) = network(), inputs()
    weights = torch.randn(POSITIONS, generator=torch.Generator().manual_seed(3))
    states.requires_grad_()
    expected = gradients(model, states, *by_autograd(model, states, tokens, temperature), weights)
    scores = head_scores(model, states, tokens, temperature=temperature, entropy_gradient=True)
    for got, wanted in zip(gradients(model, states, scores.logprobs, scores.entropy, weights), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("rows", [5, 100])
def test_the_entropy_has_no_gradient_unless_it_is_asked_for(monkeypatch, rows):
    monkeypatch.setitem(head.CHUNK, "cpu", rows * 50)
    model, (states, tokens) = network(), inputs()
    scores = head_scores(model, states.requires_grad_(), tokens)
    assert scores.logprobs.requires_grad
    assert not scores.entropy.requires_grad


@pytest.mark.parametrize("rows", [5, 100])
def test_collisions_come_beside_the_rest_and_change_nothing(monkeypatch, rows):
    monkeypatch.setitem(head.CHUNK, "cpu", rows * 50)
    model, (states, tokens) = network(), inputs()
    states.requires_grad_()
    plain, asked = (head_scores(model, states, tokens, collisions=wanted) for wanted in (False, True))
    assert plain.collisions is None
    torch.testing.assert_close(asked.collisions, torch.softmax(model.lm_head(states), -1).square().sum(-1).log())
    assert not asked.collisions.requires_grad
    weights = torch.arange(float(POSITIONS))
    for scores in (plain, asked):
        assert torch.equal(scores.logprobs, plain.logprobs)
    one, other = (
        torch.autograd.grad((weights * scores.logprobs).sum(), [states, model.lm_head.weight])
        for scores in (plain, asked)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("rows", [5, 23])
def test_equal_weights_make_the_gradient_in_the_forward(monkeypatch, rows):
    monkeypatch.setitem(head.CHUNK, "cpu", rows * 50)
    model, (states, tokens) = network(), inputs()
    states.requires_grad_()
    expected = torch.autograd.grad(
        -by_autograd(model, states, tokens, 1.0)[0].sum() / 7, [states, model.lm_head.weight]
    )
    scores = head_scores(model, states, tokens, equal_weights=True)
    with torch.no_grad():
        model.lm_head.weight.mul_(100)  # the backward has no more use for it
    got = torch.autograd.grad(-scores.logprobs.sum() / 7, [states, model.lm_head.weight])
    for made, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(made, wanted)


def test_weights_that_are_not_equal_after_all_are_an_error():
    model, (states, tokens) = network(), inputs()
    scores = head_scores(model, states.requires_grad_(), tokens, equal_weights=True)
    with pytest.raises(RuntimeError, match="weigh alike"):
        (scores.logprobs * torch.arange(POSITIONS)).sum().backward()


def test_a_loss_that_is_not_a_number_gives_such_gradients():
    model, (states, tokens) = network(), inputs()
    scores = head_scores(model, states.requires_grad_(), tokens, equal_weights=True)
    assert torch.autograd.grad(scores.logprobs.sum() * float("nan"), states)[0].isnan().all()


def test_the_graph_can_be_gone_through_twice():
    model, (states, tokens) = network(), inputs()
    scores = head_scores(model, states.requires_grad_(), tokens)
    first, second = (torch.autograd.grad(scores.logprobs.sum(), states, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("equal_weights", [False, True])
def test_no_position_at_all_is_no_loss_and_no_gradient(equal_weights):
    model, (states, tokens) = network(), inputs()
    scores = head_scores(model, states[:0].requires_grad_(), tokens[:0], equal_weights=equal_weights)
    scores.logprobs.sum().backward()
    assert not model.lm_head.weight.grad.any()


def test_without_gradients_nothing_is_kept_or_made():
    model, (states, tokens) = network(), inputs()
    with torch.no_grad():
        scores = head_scores(model, states, tokens, equal_weights=True)
    assert scores.logprobs.grad_fn is None


def test_autocast_is_the_same_in_the_backward(monkeypatch):
    """Logits that are computed again must be those of the forward, or the gradient is another function's."""
    monkeypatch.setitem(head.CHUNK, "cpu", 5 * 50)
    monkeypatch.setitem(head.KEPT, "cpu", 0)
    model, (states, tokens) = network(), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chunks = head_scores(model, states.requires_grad_(), tokens)
        monkeypatch.setitem(head.CHUNK, "cpu", 100 * 50)
        monkeypatch.setitem(head.KEPT, "cpu", 100 * 50)
        whole = head_scores(model, states, tokens)
    assert torch.equal(chunks.logprobs, whole.logprobs)
    weights = torch.randn(POSITIONS, generator=torch.Generator().manual_seed(3))
    one, other = (torch.autograd.grad((s.logprobs * weights).sum(), states)[0] for s in (chunks, whole))
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


class Largest(TorchDispatchMode):
    """The most elements that any tensor had."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, torch.Tensor):
                self.elements = max(self.elements, made.numel())
        return result


@pytest.mark.parametrize("equal_weights", [False, True])
@pytest.mark.parametrize("vocabulary", [1_000, 4_000, 16_000])
def test_no_tensor_is_larger_than_a_chunk_or_the_weights_however_large_the_vocabulary(
    monkeypatch, vocabulary, equal_weights
):
    """Forward and backward: trl#3678, where B x T x V logits ran out of memory."""
    monkeypatch.setitem(head.CHUNK, "cpu", 20_000)
    monkeypatch.setitem(head.KEPT, "cpu", 20_000)
    model, (states, tokens) = network(vocabulary, hidden=4), inputs(vocabulary, hidden=4)
    with Largest() as largest:
        head_scores(model, states.requires_grad_(), tokens, equal_weights=equal_weights).logprobs.sum().backward()
    assert max(20_000 // vocabulary, 1) * vocabulary <= largest.elements <= max(20_000, 4 * vocabulary)
    assert largest.elements < POSITIONS * vocabulary


@pytest.mark.parametrize("equal_weights", [False, True])
@pytest.mark.parametrize("vocabulary", [1_000, 4_000, 16_000])
def test_what_waits_for_the_backward_does_not_grow_with_the_vocabulary(monkeypatch, vocabulary, equal_weights):
    monkeypatch.setitem(head.CHUNK, "cpu", 4_000)
    monkeypatch.setitem(head.KEPT, "cpu", 8_000)
    model, (states, tokens) = network(vocabulary, hidden=4), inputs(vocabulary, hidden=4)
    gc.collect()
    before = {id(x) for x in gc.get_objects() if isinstance(x, torch.Tensor)}
    scores = head_scores(model, states.requires_grad_(), tokens, equal_weights=equal_weights)
    alive = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and id(x) not in before]
    as_wide_as_the_vocabulary = [x for x in alive if x.shape[-1:] == (vocabulary,)]
    # Log-probabilities, and not the logits as well.
    assert sum(x.numel() for x in as_wide_as_the_vocabulary) <= max(8_000, vocabulary)
    scores.logprobs.sum().backward()
