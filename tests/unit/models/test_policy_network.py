"""The policy against plain transformers, one unpadded row at a time."""

import itertools

import pytest
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.spec import ModelSpec


def plain(network, rows, temperature=1.0):
    """Row by row: log-probability, entropy, greedy, mean logit and collision of every response token, joined over the rows."""
    joined = []
    for row, prompt in zip(rows.tokens, rows.prompts, strict=True):
        ids = torch.tensor([row])
        logits = network(input_ids=ids).logits[0, prompt - 1 : -1]
        tokens = ids[0, prompt:]
        log_probs = torch.log_softmax(logits / temperature, -1)
        categorical = torch.distributions.Categorical(logits=logits / temperature)
        chosen = log_probs[torch.arange(len(tokens)), tokens]
        collision = categorical.probs.square().sum(-1).log()
        joined.append((chosen, categorical.entropy(), logits.argmax(-1) == tokens, logits.mean(-1), collision))
    return [torch.cat(parts) for parts in zip(*joined, strict=True)]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_scores_each_row_as_if_alone(causal, rows, side, extra, temperature):
    ids, attention, response = rows.laid_out(side, extra)
    output = PolicyNetwork(causal)(ids, attention, response, temperature=temperature, collisions=True)
    with torch.no_grad():
        expected = plain(causal, rows, temperature)
    for field, value in zip(output, expected, strict=True):
        torch.testing.assert_close(field[response[:, 1:]], value, rtol=1e-5, atol=1e-5)
        assert field[~response[:, 1:]].eq(0).all()
    assert 0 < output.greedy.sum() < response.sum()  # else the comparison of that field says nothing


@pytest.mark.parametrize("side", ["right", "left"])
def test_ids_in_the_padding_have_no_effect(causal, rows, side):
    policy = PolicyNetwork(causal)
    clean = policy(*rows.laid_out(side, 2)).logprobs
    dirty = policy(*rows.laid_out(side, 2, garbage=7)).logprobs
    torch.testing.assert_close(clean, dirty, rtol=0, atol=1e-6)


def test_prompts_padded_left_and_responses_padded_right_score_as_alone(causal, rows):
    """The layout of a rollout."""
    prompt_width, response_width = 4, 6
    ids = torch.zeros(len(rows.tokens), prompt_width + response_width, dtype=torch.long)
    attention, response = (torch.zeros(ids.shape, dtype=torch.bool) for _ in range(2))
    for b, (row, prompt) in enumerate(zip(rows.tokens, rows.prompts, strict=True)):
        columns = slice(prompt_width - prompt, prompt_width - prompt + len(row))
        ids[b, columns] = torch.tensor(row)
        attention[b, columns] = True
        response[b, prompt_width : columns.stop] = True
    output = PolicyNetwork(causal)(ids, attention, response)
    torch.testing.assert_close(output.logprobs[response[:, 1:]], plain(causal, rows)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_gradients_are_those_of_the_plain_computation(causal, rows, side):
    ids, attention, response = rows.laid_out(side, 1)
    weights = torch.linspace(-1, 1, int(response.sum()))

    def gradients(logprobs):
        return torch.autograd.grad((logprobs * weights).sum(), list(causal.parameters()))

    ours = gradients(PolicyNetwork(causal)(ids, attention, response).logprobs[response[:, 1:]])
    for own, expected in zip(ours, gradients(plain(causal, rows)[0]), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    assert max(g.abs().max() for g in ours) > 0.1


def test_entropy_carries_a_gradient_only_when_asked_for(causal, rows):
    policy, batch = PolicyNetwork(causal), rows.laid_out("right")
    assert not policy(*batch).entropy.requires_grad
    parameters = list(causal.parameters())
    ours = torch.autograd.grad(policy(*batch, entropy_gradient=True).entropy.sum(), parameters)
    expected = torch.autograd.grad(plain(causal, rows)[1].sum(), parameters)
    for own, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_dropout_is_off_even_in_training_mode(causal, rows):
    policy, batch = PolicyNetwork(causal).train(), rows.laid_out("right")
    assert torch.equal(policy(*batch).logprobs, policy(*batch).logprobs)
    left = {k: v for k, v in causal.config.to_dict().items() if "drop" in k and isinstance(v, float)}
    assert left
    assert set(left.values()) == {0.0}


def test_probabilities_of_every_possible_response_sum_to_one(causal):
    """Responses of at most three tokens that end at EOS (2): shift, EOS or mask errors break the sum."""
    others = [token for token in range(12) if token != 2]
    responses = [[*head, 2] for n in range(3) for head in itertools.product(others, repeat=n)]
    responses += [list(cut) for cut in itertools.product(others, repeat=3)]
    prompt = [1, 5]
    lengths = torch.tensor([len(r) for r in responses])
    ids = torch.tensor([prompt + r + [0] * (3 - len(r)) for r in responses])
    attention = torch.arange(5) < (2 + lengths)[:, None]
    response = attention & (torch.arange(5) >= 2)
    with torch.no_grad():
        logprobs = PolicyNetwork(causal)(ids, attention, response).logprobs
    assert logprobs.sum(1).exp().sum().item() == pytest.approx(1.0, abs=1e-5)


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LOGIT_CHANGERS = {
    "gemma2": {"head_dim": 8, "num_key_value_heads": 1, "final_logit_softcapping": 0.7, "attn_logit_softcapping": None},
    "granite": {"num_key_value_heads": 1, "logits_scaling": 3.0},
    "cohere": {"num_key_value_heads": 1, "logit_scale": 0.25},
}


@pytest.mark.parametrize("model_type", LOGIT_CHANGERS)
def test_architectures_that_change_their_logits_after_the_head_are_followed(model_type, tokenizer, rows):
    spec = ModelSpec(architecture={"model_type": model_type, **SMALL, **LOGIT_CHANGERS[model_type]})
    network = load_causal_lm(spec, tokenizer)
    network.get_output_embeddings().weight.data.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    ids, attention, response = rows.laid_out("right")
    logprobs = PolicyNetwork(network)(ids, attention, response).logprobs[response[:, 1:]]
    torch.testing.assert_close(logprobs, plain(network, rows)[0], rtol=1e-5, atol=1e-5)


def test_an_unknown_change_of_the_logits_is_refused(causal):
    own = causal.forward

    def changed(*args, **kwargs):
        output = own(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    causal.forward = changed
    with pytest.raises(UserError, match="head_logits"):
        PolicyNetwork(causal)
