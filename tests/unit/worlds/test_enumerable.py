"""The enumerable world: every response is there, the tables are what the seed says, rows follow their distributions."""

import itertools
import math

import pytest
import torch

from rlhf_lightning.data.preferences import PreferenceDataModule
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.errors import UserError
from rlhf_lightning.rewards.enumerable import EnumerableReward
from rlhf_lightning.rewards.reward import Samples
from rlhf_lightning.worlds import EnumerableWorld
from rlhf_lightning.worlds.enumerable import enumerate_responses

EOS = 1


@pytest.fixture(scope="module")
def world():
    return EnumerableWorld(seed=0, max_new_tokens=2, preferences=20_000, prompt_rows=100, held_out=8)


@pytest.mark.parametrize(("length", "count"), [(1, 8), (2, 57), (3, 400)])
def test_every_response_is_enumerated_once(length, count):
    """1 + 7 + 7 * 7 * 8 = 400: ended at once, after one word, or two words and any third token."""
    responses = enumerate_responses([EOS, *range(10, 17)], EOS, length)
    assert len(responses) == len({tuple(y) for y in responses}) == count
    sequences = itertools.product([EOS, *range(10, 17)], repeat=length)
    cut = {y[: y.index(EOS) + 1] if EOS in y else y for y in sequences}  # what is left of all of them after EOS
    assert {tuple(y) for y in responses} == cut


def test_the_default_world_is_the_one_of_four_hundred(world):
    large = EnumerableWorld()
    assert (len(large.prompts), len(large.responses)) == (4, 400)
    assert sum(large.truncated.tolist()) == 343
    assert all(len(ids) == 2 for ids in large.prompt_ids)
    assert sum(p.numel() for p in large.reference().parameters()) == pytest.approx(102_000, rel=0.01)
    assert len(world.responses) == 57


def test_the_seed_decides_everything(world):
    again, other = EnumerableWorld(0, max_new_tokens=2), EnumerableWorld(1, max_new_tokens=2)
    torch.rand(3)  # the global generator has no say
    assert torch.equal(again.rewards, world.rewards)
    assert torch.equal(again.ref_logps, world.ref_logps)
    assert again.load("preferences")["train"][:5] == world.load("preferences")["train"][:5]
    assert (other.rewards - world.rewards).abs().max() > 0.5
    assert (other.ref_logps - world.ref_logps).abs().max() > 0.5


def test_making_a_reference_leaves_the_global_generator_alone(world):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    world.reference()
    assert torch.equal(torch.get_rng_state(), before)


def test_rewards_are_standardised_and_depend_on_the_prompt(world):
    assert world.rewards.mean().item() == pytest.approx(0, abs=1e-12)
    assert world.rewards.std().item() == pytest.approx(1)
    assert torch.corrcoef(world.rewards).triu(1).abs().max() < 0.5


def test_the_reference_is_a_distribution_with_opinions(world):
    assert world.ref_logps.exp().sum(1).sub(1).abs().max() < 1e-12
    entropy = -(world.ref_logps.exp() * world.ref_logps).sum(1)
    assert (entropy < 0.95 * math.log(57)).all()
    assert (entropy > 1).all()


def test_a_tempered_reference_is_flatter(world):
    with torch.no_grad():
        warm, cold = (world.logps(world.reference().double(), temperature=t).exp() for t in (2.0, 0.5))
    assert (warm.max(1).values < cold.max(1).values).all()
    assert warm.sum(1).sub(1).abs().max() < 1e-12


def test_log_probabilities_are_those_of_generating_token_by_token(world):
    """A loop over steps of the chain rule, one response at a time."""
    network, (prompt, x) = world.reference().double(), (world.prompt_ids[2], 2)
    with torch.no_grad():
        for y in (0, 3, 20, 56):
            total, ids = 0.0, list(prompt)
            for token in world.responses[y]:
                total += network(torch.tensor([ids])).logits[0, -1].log_softmax(0)[token].item()
                ids.append(token)
            assert total == pytest.approx(world.ref_logps[x, y].item(), abs=1e-9)


def test_pairs_are_drawn_from_the_reference_and_labelled_by_bradley_terry(world):
    rows = world.load("preferences")["train"]
    place = {world.text(ids): y for y, ids in enumerate(world.responses)}
    seen = torch.zeros(len(world.prompts), 57, 57, dtype=torch.float64)
    for prompt, chosen, rejected in zip(rows["prompt"], rows["chosen"], rows["rejected"], strict=True):
        seen[world.prompts.index(prompt), place[chosen], place[rejected]] += 1
    assert seen.diagonal(dim1=1, dim2=2).sum() == 0  # equal sides say nothing
    assert seen.sum((1, 2)).tolist() == [5000] * 4
    p, r = world.ref_logps.exp(), world.rewards
    drawn = p[:, :, None] * p[:, None, :] * (1 - torch.eye(57))
    expected = 5000 * 2 * drawn / drawn.sum((1, 2), keepdim=True) * torch.sigmoid(r[:, :, None] - r[:, None, :])
    often = expected > 8
    assert often.sum() > 100
    chi_square = ((seen - expected) ** 2 / expected)[often].mean().item()
    assert chi_square == pytest.approx(1, abs=6 * math.sqrt(2 / often.sum().item()))


def test_what_was_cut_off_is_tokenized_without_eos_and_what_ended_with_one(world):
    """DPO on a response with an EOS that nobody sampled would move a probability that the optimum says nothing about."""
    data = PreferenceDataModule(world, batch_size=32)
    data.prepare_data()
    rows = data.rows["train"]
    ids = {tuple(y) for y in world.responses}
    assert {tuple(y) for side in ("chosen_ids", "rejected_ids") for y in rows[side]} <= ids
    assert all(list(x) in world.prompt_ids for x in rows["prompt_ids"])


def test_prompts_come_equally_often_and_at_one_length(world):
    data = PromptDataModule(world, batch_size=4)
    data.prepare_data()
    assert len(data.rows["train"]) == 100
    assert {tuple(x) for x in data.rows["train"]["prompt_ids"]} == {tuple(x) for x in world.prompt_ids}
    assert data.rows["train"]["prompt"].count(world.prompts[1]) == 25


def test_the_reward_is_looked_up_by_prompt_and_token_ids(world):
    reward = EnumerableReward(world)
    ids = [world.responses[i] for i in (0, 30)]
    samples = Samples([world.prompts[3], world.prompts[1]], ["", ""], [list(y) for y in ids], [False, True])
    assert reward.score(samples).tolist() == pytest.approx([world.rewards[3, 0].item(), world.rewards[1, 30].item()])


def test_a_response_of_another_world_is_named(world):
    with pytest.raises(UserError, match=r"\[5, 5, 5\] is no response to 'x0 x0'.*max_new_tokens to 2"):
        world.reward("x0 x0", [5, 5, 5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": 0}, "prompts"),
        ({"response_tokens": 1}, "response_tokens.*at least 2"),
        ({"preferences": 0}, "preferences"),
        ({"max_new_tokens": 9}, "written down"),
    ],
)
def test_an_impossible_world_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        EnumerableWorld(**arguments)


def test_it_has_no_demonstrations(world):
    with pytest.raises(UserError, match="no 'demonstrations'; it has preferences, prompts"):
        world.load("demonstrations")
