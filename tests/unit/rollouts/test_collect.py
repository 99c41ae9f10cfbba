"""From prompts to a rollout: what counts of a response, and log-probabilities that a plain forward gives too."""

import pytest
import torch

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import Generation, GenerationEngine, SamplingParameters
from rlhf_lightning.generation.transformers_engine import TransformersEngine
from rlhf_lightning.models.actor_critic import ActorCritic
from rlhf_lightning.models.frozen import Frozen
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.rewards.reward import checked_scores
from rlhf_lightning.rollouts.collect import generate_responses, score_responses


class Told(GenerationEngine):
    def __init__(self, tokens):
        self.tokens = torch.tensor(tokens)

    def generate(self, network, input_ids, attention_mask, sampling, *, eos_ids, pad_id):
        self.eos_ids = eos_ids
        return Generation(self.tokens)


PROMPTS = [[4, 5, 6], [7], [8, 9], [10, 11, 4]]
BATCH = PromptBatch(
    input_ids=torch.tensor([[0] * (3 - len(p)) + p for p in PROMPTS]),
    attention_mask=torch.tensor([[False] * (3 - len(p)) + [True] * len(p) for p in PROMPTS]),
    prompts=["a b c", "d", "e f", "g h a"],
    columns={"answer": list("wxyz")},
)


def test_what_counts_is_marked_and_what_follows_eos_is_wiped(networks, tokenizer):
    engine = Told([[4, 5, 2, 9], [6, 7, 8, 9], [2, 9, 9, 9], [0, 4, 9, 2]])
    responses = generate_responses(BATCH, networks[0], tokenizer, engine, SamplingParameters())
    assert engine.eos_ids == [2]
    assert responses.response_mask.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert responses.truncated.tolist() == [False, True, False, False]
    assert responses.input_ids[:, :3].tolist() == BATCH.input_ids.tolist()
    assert responses.input_ids[:, 3:].tolist() == [[4, 5, 2, 0], [6, 7, 8, 9], [2, 0, 0, 0], [0, 4, 9, 2]]
    assert responses.attention_mask.int().tolist() == [
        [1, 1, 1, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1],
    ]
    assert responses.sequence_mask[:, :3].eq(False).all()
    assert torch.equal(responses.sequence_mask[:, 3:], responses.response_mask)
    samples = responses.samples
    assert samples.prompts == BATCH.prompts
    assert samples.completions == ["a b", "c d e f", "", "a f"]
    assert samples.completion_ids == [[4, 5, 2], [6, 7, 8, 9], [2], [0, 4, 9, 2]]
    assert samples.truncated == [False, True, False, False]
    assert samples.columns == {"answer": list("wxyz")}


def test_every_end_that_the_model_knows_ends_a_response(networks, tokenizer):
    networks[0].generation_config.eos_token_id = [9]
    engine = Told([[4, 9, 5, 5], [4, 2, 9, 5], [4, 5, 5, 5], [9, 2, 9, 2]])
    responses = generate_responses(BATCH, networks[0], tokenizer, engine, SamplingParameters())
    assert engine.eos_ids == [2, 9]
    assert responses.response_mask.sum(1).tolist() == [2, 2, 4, 1]
    assert responses.samples.completions == ["a", "a", "a b b b", ""]


@pytest.fixture
def sampled(networks, tokenizer):
    torch.manual_seed(0)
    sampling = SamplingParameters(max_new_tokens=6, temperature=0.8)
    networks[0].generation_config.eos_token_id = [5, 10]
    responses = generate_responses(BATCH, networks[0], tokenizer, TransformersEngine(), sampling)
    assert len(set(responses.response_mask.sum(1).tolist())) > 1  # of different lengths, else the masks are not tested
    return responses


def reward():
    return FunctionReward(lambda completion_ids: [10.0 * len(ids) + ids[0] for ids in completion_ids])


def scored(responses, networks, reference, *, temperature=0.8, micro_batch_size=4):
    model = ActorCritic(PolicyNetwork(networks[0]), ScalarModel(networks[2]))
    arguments = {"temperature": temperature, "micro_batch_size": micro_batch_size}
    scores = checked_scores(reward(), responses.samples)
    return model, score_responses(responses, model, Frozen(PolicyNetwork(reference)), scores, **arguments)


@torch.no_grad()
def plain(network, prompt, response, temperature):
    logits = network(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
def test_everything_recorded_equals_a_plain_forward_of_each_row(sampled, networks, micro_batch_size):
    _, rollout = scored(sampled, networks, networks[1], micro_batch_size=micro_batch_size)
    for b, (prompt, ids) in enumerate(zip(PROMPTS, sampled.samples.completion_ids, strict=True)):
        n = len(ids)
        for field, network in ((rollout.logprobs, networks[0]), (rollout.ref_logprobs, networks[1])):
            expected = plain(network, prompt, ids, 0.8)[torch.arange(n), ids]
            torch.testing.assert_close(field[b, :n], expected, rtol=1e-5, atol=1e-5)
            assert field[b, n:].eq(0).all()
        entropy = torch.distributions.Categorical(logits=plain(networks[0], prompt, ids, 0.8)).entropy()
        torch.testing.assert_close(rollout.entropy[b, :n], entropy, rtol=1e-5, atol=1e-5)
        critic = networks[2]
        with torch.no_grad():
            hidden = critic.base_model(input_ids=torch.tensor([prompt + ids])).last_hidden_state
            values = critic.score(hidden)[0, len(prompt) - 1 : -1, 0]
        torch.testing.assert_close(rollout.values[b, :n], values, rtol=1e-5, atol=1e-5)
        assert rollout.scores[b].item() == 10 * n + ids[0]
    assert rollout.advantages.eq(0).all()
    assert rollout.returns.eq(0).all()
    assert not rollout.logprobs.requires_grad


def test_the_ratio_is_one_when_the_same_weights_look_again(sampled, networks):
    model, rollout = scored(sampled, networks, networks[1], micro_batch_size=2)
    rows = torch.arange(4).split(2)
    again = [rollout.rows(r) for r in rows]
    for part in again:
        output = model(part.input_ids, part.attention_mask, part.sequence_mask, temperature=0.8)
        assert torch.equal(output.logprobs[:, -part.logprobs.shape[1] :], part.logprobs)
    for part in rollout.micro_batches(1):
        output = model(part.input_ids, part.attention_mask, part.sequence_mask, temperature=0.8)
        ratio = (output.logprobs[:, -part.logprobs.shape[1] :] - part.logprobs).exp()
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)


def test_a_reference_equal_to_the_policy_is_at_a_kl_of_exactly_zero(sampled, networks):
    _, rollout = scored(sampled, networks, networks[0])
    assert torch.equal(rollout.logprobs, rollout.ref_logprobs)
    _, other = scored(sampled, networks, networks[1])
    assert not torch.equal(other.logprobs, other.ref_logprobs)


def test_a_reward_that_gives_nan_is_refused(sampled):
    bad = FunctionReward(lambda prompts: [float("nan")] * 4)
    with pytest.raises(UserError, match="nan for 4 of 4"):
        checked_scores(bad, sampled.samples)
