"""The answers in the back of the book: optima of regularised objectives over response spaces that can be written down.

Tables have one row a prompt and one column a response, shape (prompts, responses); a row of log-probabilities sums to one.
Use float64: the differences of interest are of the order of 1e-3 and less.
"""

import math

import torch
from torch import Tensor


def kl_optimum(ref_logps: Tensor, rewards: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    r"""The policy that no other beats under a KL penalty, and the value that it reaches.

    .. math:: \pi^*(y|x) = \pi_{ref}(y|x)\, e^{r(x,y)/\beta} / Z(x), \qquad V^*(x) = \beta \log Z(x)

    Args:
        ref_logps: Log-probabilities of the reference. Shape (prompts, responses), nats.
        rewards: r. Same shape.
        beta: Weight of the KL, > 0.

    Returns:
        log pi*, shape (prompts, responses), and V*, shape (prompts,).

    Source: Rafailov et al. 2023, eq. 4 and appendix A.1, https://arxiv.org/abs/2305.18290
    """
    tilted = ref_logps + rewards / beta
    log_z = torch.logsumexp(tilted, dim=1)
    return tilted - log_z[:, None], beta * log_z


def forward_kl_optimum(ref_logps: Tensor, rewards: Tensor, *, beta: float) -> Tensor:
    r"""The policy that no other beats under a penalty of the *other* KL: where GRPO's k3 in the loss leads.

    .. math:: \arg\max_\pi E_\pi[r] - \beta\, KL(\pi_{ref} \| \pi), \qquad
        \pi(y|x) = \frac{\beta\, \pi_{ref}(y|x)}{\lambda_x - r(x,y)}, \quad \lambda_x > \max_y r(x,y)

    Its tails are heavy: no reward, however low, takes more than a factor from a response. :math:`\lambda_x` makes the row sum
    to one, and is found by bisection: it lies between the greatest reward and beta above it.

    Args:
        ref_logps: Log-probabilities of the reference. Shape (prompts, responses), nats, float64.
        rewards: r. Same shape.
        beta: Weight of the KL, > 0.

    Returns:
        Log-probabilities. Shape (prompts, responses), nats.

    Source: derived by setting the derivative in each probability to :math:`\lambda_x`; per token where a response is one token.
    """
    best = rewards.amax(dim=1, keepdim=True)
    low, high = best.clone(), best + beta
    for _ in range(200):
        middle = (low + high) / 2
        too_small = (beta * ref_logps.exp() / (middle - rewards)).sum(dim=1, keepdim=True) > 1
        low, high = torch.where(too_small, middle, low), torch.where(too_small, high, middle)
    return ref_logps + math.log(beta) - (high - rewards).log()


def expected(logps: Tensor, table: Tensor) -> Tensor:
    r"""Mean of a table under a policy, :math:`\sum_y \pi(y|x)\, t(x,y)`; what has probability zero counts as zero.

    Args:
        logps: Log-probabilities of the policy. Shape (prompts, responses), nats.
        table: What is averaged. Same shape.

    Returns:
        Shape (prompts,).
    """
    p = logps.exp()
    return torch.where(p > 0, p * table, 0).sum(dim=1)


def exact_kl(logps: Tensor, other_logps: Tensor) -> Tensor:
    r"""KL divergence by its definition, :math:`\sum_y \pi (\log\pi - \log q)`.

    Args:
        logps: Of the policy. Shape (prompts, responses), nats.
        other_logps: Of q. Same shape.

    Returns:
        Shape (prompts,), nats.
    """
    return expected(logps, logps - other_logps)


def objective(logps: Tensor, ref_logps: Tensor, rewards: Tensor, *, beta: float) -> Tensor:
    r"""What PPO and DPO maximise: :math:`J(x) = E_\pi[r] - \beta\, KL(\pi \| \pi_{ref})`.

    For every policy :math:`V^* - J = \beta\, KL(\pi \| \pi^*)`, with pi* and V* of :func:`kl_optimum`.

    Args:
        logps: Of the policy. Shape (prompts, responses), nats.
        ref_logps: Of the reference. Same shape.
        rewards: Same shape.
        beta: Weight of the KL.

    Returns:
        Shape (prompts,).

    Source: Ziegler et al. 2019, eq. 2, https://arxiv.org/abs/1909.08593
    """
    return expected(logps, rewards) - beta * exact_kl(logps, ref_logps)


def win_rates(rewards: Tensor, rival_logps: Tensor) -> Tensor:
    r"""How often each response is preferred to one drawn from a rival: :math:`E_{y' \sim \mu}[\sigma(r(y) - r(y'))]`.

    Preferences are Bradley-Terry at scale 1.

    Args:
        rewards: Shape (prompts, responses).
        rival_logps: Log-probabilities of mu, the policy that the pairs are drawn from. Same shape, nats.

    Returns:
        Shape (prompts, responses), in (0, 1).
    """
    preferred = torch.sigmoid(rewards[:, :, None] - rewards[:, None, :])
    return (preferred * rival_logps.exp()[:, None, :]).sum(dim=-1)


def ipo_optimum(ref_logps: Tensor, rewards: Tensor, rival_logps: Tensor, *, tau: float) -> Tensor:
    r"""Where IPO ends on Bradley-Terry preferences between responses drawn from mu.

    .. math:: \pi(y|x) \propto \pi_{ref}(y|x) \exp\left(E_{y' \sim \mu}[p(y \succ y') - 1/2] / \tau\right)

    Not :func:`kl_optimum` of the reward: IPO values how often a response wins, not by how much.

    Args:
        ref_logps: Of the reference. Shape (prompts, responses), nats.
        rewards: What the preferences come from. Same shape.
        rival_logps: Of mu. Same shape, nats.
        tau: Strength of the pull to the reference, > 0.

    Returns:
        Log-probabilities, shape (prompts, responses).

    Source: Azar et al. 2023, eq. 7 and 10, https://arxiv.org/abs/2310.12036
    """
    return kl_optimum(ref_logps, win_rates(rewards, rival_logps), beta=tau)[0]  # a constant such as 1/2 cancels


def frontier(ref_logps: Tensor, rewards: Tensor, betas: Tensor) -> tuple[Tensor, Tensor]:
    """The best reward for every KL that can be paid: KL and reward of the optima for these weights of the KL.

    Args:
        ref_logps: Of the reference. Shape (prompts, responses), nats.
        rewards: Same shape.
        betas: Weights of the KL, > 0. Shape (n,).

    Returns:
        KL from the reference in nats and expected reward, means over the prompts, shape (n,) each.

    Source: Gao et al. 2022, section 3.1, https://arxiv.org/abs/2210.10760, for the plane; the curve is :func:`kl_optimum`'s.
    """
    optima = [kl_optimum(ref_logps, rewards, beta=float(beta))[0] for beta in betas]
    kl = torch.stack([exact_kl(logps, ref_logps).mean() for logps in optima])
    return kl, torch.stack([expected(logps, rewards).mean() for logps in optima])


def frontier_reward(ref_logps: Tensor, rewards: Tensor, kl: float) -> float:
    r"""The highest mean reward that any policy has whose mean KL from the reference is at most this.

    .. math:: \max_{KL(\pi \| \pi_{ref}) \le k} E_\pi[r] = \min_{\beta > 0} \left(\beta k + E_x V^*_\beta(x)\right)

    The right side is Lagrange's dual, convex in beta and a bound from above at *every* beta; it is minimised by golden
    section over log beta in [-12, 12].

    Args:
        ref_logps: Of the reference. Shape (prompts, responses), nats.
        rewards: Same shape.
        kl: k, mean over the prompts, >= 0, nats.

    Returns:
        The mean reward over the prompts.

    Source: Boyd and Vandenberghe, Convex Optimization, section 5.2.3 (Slater's condition holds: the reference is feasible).
    """

    def bound(log_beta: float) -> float:
        beta = math.exp(log_beta)
        return beta * kl + float(kl_optimum(ref_logps, rewards, beta=beta)[1].mean())

    low, high, section = -12.0, 12.0, (5**0.5 - 1) / 2
    for _ in range(80):
        left, right = high - section * (high - low), low + section * (high - low)
        low, high = (low, right) if bound(left) < bound(right) else (left, high)
    return bound((low + high) / 2)
