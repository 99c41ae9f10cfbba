"""With one free logit a decision, in float64, each method ends in its own closed form: nothing is left to blame the network."""

import pytest
import torch

from rlhf_lightning.evaluation.gradients import Population, preference_weights
from rlhf_lightning.functional.advantages import gae
from rlhf_lightning.functional.optimum import exact_kl, ipo_optimum, kl_optimum, objective
from rlhf_lightning.functional.policy import clipped_policy_loss
from rlhf_lightning.functional.rewards import token_rewards
from rlhf_lightning.losses import DPOLoss, IPOLoss
from rlhf_lightning.worlds import EnumerableWorld
from tests.pairs import pairs_of

BETA = 0.5


class Tabular:
    """An autoregressive policy with a row of logits for every prefix of every prompt."""

    def __init__(self, world):
        self.world = world
        prefixes = sorted({tuple(y[:t]) for y in world.responses for t in range(len(y))}, key=len)
        rows = {prefix: i for i, prefix in enumerate(prefixes)}
        width, prompts = world.max_new_tokens, len(world.prompts)
        column = {token: i for i, token in enumerate(world.tokens)}
        self.mask = torch.tensor([[t < len(y) for t in range(width)] for y in world.responses])
        self.row, self.column = torch.zeros(2, *self.mask.shape, dtype=torch.long)
        for i, y in enumerate(world.responses):
            for t, token in enumerate(y):
                self.row[i, t], self.column[i, t] = rows[tuple(y[:t])], column[token]
        self.logits = torch.zeros(prompts, len(prefixes), len(world.tokens), dtype=torch.float64, requires_grad=True)

    def token_logps(self):
        """Shape (prompts, responses, length), zero off the response."""
        return self.logits.log_softmax(2)[:, self.row, self.column].masked_fill(~self.mask, 0)

    def logps(self):
        return self.token_logps().sum(2)

    def ref_token_logps(self):
        """Those of the world's reference, from its table: log p(prefix with the token) - log p(prefix)."""
        p, masses = (
            self.world.ref_logps.exp(),
            torch.zeros(len(self.world.prompts), *self.mask.shape, dtype=torch.float64),
        )
        for i, y in enumerate(self.world.responses):
            for t in range(len(y)):
                goes_on = torch.tensor([z[: t + 1] == y[: t + 1] for z in self.world.responses])
                begins = torch.tensor([z[:t] == y[:t] and len(z) > t for z in self.world.responses])
                masses[:, i, t] = p[:, goes_on].sum(1).log() - p[:, begins].sum(1).log()
        return masses


def descend(policy, loss_of):
    """Newton-like descent until nothing moves."""
    optimizer = torch.optim.LBFGS(
        [policy.logits], max_iter=2000, max_eval=4000, tolerance_grad=1e-13, tolerance_change=0, history_size=50,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        loss = loss_of(policy.logps())
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return policy.logps().detach()


def total_variation(logps, expected):
    return 0.5 * (logps.exp() - expected.exp()).abs().sum(1).max().item()


@pytest.fixture(scope="module", params=[1, 2], ids=["one token", "two tokens"])
def world(request):
    return EnumerableWorld(seed=3, max_new_tokens=request.param, response_tokens=8 if request.param == 1 else 5)


def tolerance(world):
    return 1e-6 if world.max_new_tokens == 1 else 1e-5


def test_dpo_reaches_the_kl_optimum(world):
    loss = Population(DPOLoss(BETA), preference_weights(world))
    found = descend(
        Tabular(world), lambda logps: loss.pairs(pairs_of(*[(logps - world.ref_logps).flatten()] * 2)).sum()
    )
    optimum, _ = kl_optimum(world.ref_logps, world.rewards, beta=BETA)
    assert total_variation(found, optimum) < tolerance(world)
    assert total_variation(world.ref_logps, optimum) > 0.1


def test_dpo_reaches_it_whatever_the_pairs_are_drawn_from(world):
    r = world.rewards
    weights = torch.sigmoid(r[:, :, None] - r[:, None, :])  # every pair equally often
    loss = Population(DPOLoss(BETA), weights / weights.sum())
    found = descend(
        Tabular(world), lambda logps: loss.pairs(pairs_of(*[(logps - world.ref_logps).flatten()] * 2)).sum()
    )
    assert total_variation(found, kl_optimum(world.ref_logps, r, beta=BETA)[0]) < tolerance(world)


def test_ipo_reaches_its_own_closed_form_and_not_dpos(world):
    tau = 0.2
    loss = Population(IPOLoss(tau), preference_weights(world))
    found = descend(
        Tabular(world), lambda logps: loss.pairs(pairs_of(*[(logps - world.ref_logps).flatten()] * 2)).sum()
    )
    assert total_variation(found, ipo_optimum(world.ref_logps, world.rewards, world.ref_logps, tau=tau)) < tolerance(
        world
    )
    assert total_variation(found, kl_optimum(world.ref_logps, world.rewards, beta=tau)[0]) > 0.05


@pytest.mark.parametrize("bug", [None, "KL left out", "KL counted twice"])
def test_ppos_formulas_reach_the_kl_optimum_and_with_a_bug_do_not(world, bug):
    """token_rewards, gae and the surrogate on exact expectations; a natural gradient, so that a few dozen steps do."""
    policy, ref = Tabular(world), Tabular(world).ref_token_logps()
    prompts, responses, width = ref.shape
    mask = policy.mask.repeat(prompts, 1)
    for _ in range(60):
        logprobs = policy.token_logps().view(-1, width)
        old, p = logprobs.detach(), policy.logps().detach().exp()
        coef = {None: BETA, "KL left out": 0.0, "KL counted twice": 2 * BETA}[bug]
        rewards = token_rewards(world.rewards.flatten(), old, ref.view(-1, width), mask, kl_coef=coef)
        advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, gae_lambda=1.0)
        bounds = {"clip_low": 0.2, "clip_high": 0.2}
        loss = clipped_policy_loss(logprobs, old, p.view(-1, 1) * advantages, mask, **bounds).loss
        (gradient,) = torch.autograd.grad(loss.sum(), policy.logits)
        visits = torch.zeros(policy.logits.shape, dtype=torch.float64)
        for t in range(width):
            weight = p * policy.mask[:, t]
            visits.index_put_(
                (torch.arange(prompts)[:, None].expand(-1, responses), policy.row[:, t].expand(prompts, -1),
                 policy.column[:, t].expand(prompts, -1)),
                weight, accumulate=True,
            )  # fmt: skip
        with torch.no_grad():
            policy.logits -= (0.5 / BETA) * torch.where(visits > 0, gradient / visits, 0)
    optimum, value = kl_optimum(world.ref_logps, world.rewards, beta=BETA)
    found = policy.logps().detach()
    if bug is None:
        assert total_variation(found, optimum) < 1e-6
        lacks = value - objective(found, world.ref_logps, world.rewards, beta=BETA)
        assert lacks.abs().max() < 1e-9
    else:
        assert total_variation(found, optimum) > 0.05


def test_what_a_policy_lacks_is_beta_times_its_kl_from_the_optimum(world):
    policy = Tabular(world)
    with torch.no_grad():
        policy.logits.normal_(generator=torch.Generator().manual_seed(0))
        optimum, value = kl_optimum(world.ref_logps, world.rewards, beta=BETA)
        lacks = value - objective(policy.logps(), world.ref_logps, world.rewards, beta=BETA)
        torch.testing.assert_close(lacks, BETA * exact_kl(policy.logps(), optimum), rtol=0, atol=1e-9)
