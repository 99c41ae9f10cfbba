"""Log-probabilities over every possible response sum to one: nothing else catches shift, EOS and mask errors at once."""

import pytest
import torch
from enumeration import perturb

from rlhf_lightning.evaluation.exact import enumerated_rows, policy_logps
from rlhf_lightning.functional.logprobs import sequence_logprobs
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.worlds import EnumerableWorld
from rlhf_lightning.worlds.enumerable import enumerate_responses

ARCHITECTURES = {
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "initializer_range": 0.3,
    },
    "llama": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.3,
    },
}
PROMPTS = ([5], [3, 4, 6, 3], [7, 5])  # of different lengths, so that every row is padded by another amount


def laid_out(prompts, responses, side, pad, extra):
    """Every prompt with every response as input ids, attention mask and response mask, padded on one side."""
    width = max(map(len, prompts)) + max(map(len, responses)) + extra
    ids, attention, response = [], [], []
    for x in prompts:
        for y in responses:
            gap = [0] * (width - len(x) - len(y))
            for rows, row, filler in (
                (ids, x + y, [pad] * len(gap)),
                (attention, [1] * len(x + y), gap),
                (response, [0] * len(x) + [1] * len(y), gap),
            ):
                rows.append(filler + row if side == "left" else row + filler)
    return torch.tensor(ids), torch.tensor(attention).bool(), torch.tensor(response).bool()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_over_the_whole_vocabulary_pad_included(name, side, extra, temperature):
    """Here every token of the vocabulary may be said, the pad token in the middle of a response too.

    Would have caught: the EOS masked out of the loss where pad and EOS share an id (trl#3200, trl#6357), and sentinels in
    padded slots that are summed up (trl#2022).
    """
    tokenizer = EnumerableWorld(response_tokens=4, max_new_tokens=1).tokenizer()
    torch.manual_seed(0)
    policy = PolicyNetwork(load_causal_lm(ModelSpec(architecture=ARCHITECTURES[name]), tokenizer))
    responses = enumerate_responses(range(len(tokenizer)), tokenizer.eos_token_id, 3)
    assert any(tokenizer.pad_token_id in y[:-1] for y in responses)
    inputs = laid_out([list(x) for x in PROMPTS], responses, side, tokenizer.pad_token_id, extra)
    with torch.no_grad():
        logps = sequence_logprobs(policy(*inputs, temperature=temperature).logprobs, inputs[2][:, 1:])
    logps = logps.view(len(PROMPTS), len(responses)).double()
    assert logps.exp().sum(1).sub(1).abs().max() < 1e-5
    assert (
        logps.exp().max(1).values > 2 / len(responses)
    ).all()  # not the uniform distribution, whose sum hides errors


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_over_the_worlds_responses(world, temperature):
    policy = PolicyNetwork(world.reference())
    perturb(policy, 0.05)
    with torch.no_grad():
        logps = policy_logps(policy, world, temperature).double()
        plain = world.logps(policy.network.double(), temperature)
    assert logps.exp().sum(1).sub(1).abs().max() < 1e-5
    torch.testing.assert_close(logps, plain, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_over_four_hundred_responses_on_either_side():
    world = EnumerableWorld(seed=1)
    policy = PolicyNetwork(world.reference())
    pad = world.tokenizer().pad_token_id
    for side in ("left", "right"):
        inputs = laid_out(world.prompt_ids, [list(y) for y in world.responses], side, pad, 2)
        with torch.no_grad():
            logps = sequence_logprobs(policy(*inputs).logprobs, inputs[2][:, 1:]).view(4, 400).double()
        assert logps.exp().sum(1).sub(1).abs().max() < 1e-5
        torch.testing.assert_close(logps, world.ref_logps, rtol=0, atol=2e-5)


@pytest.mark.parametrize("bug", ["one position late", "EOS left out", "prompt scored"])
def test_the_sum_tells_masks_that_are_wrong(world, bug):
    policy = PolicyNetwork(world.reference())
    ids, attention, response = enumerated_rows(world, world.tokenizer().pad_token_id)
    if bug == "one position late":
        response = response & response.roll(1, dims=1)
    elif bug == "EOS left out":
        response = response & (ids != world.tokenizer().eos_token_id)
    else:
        response = attention.clone()
        response[:, 0] = False
    with torch.no_grad():
        logps = sequence_logprobs(policy(ids, attention, response).logprobs, response[:, 1:])
    assert logps.view(4, 57).exp().sum(1).sub(1).abs().min() > 1e-2
