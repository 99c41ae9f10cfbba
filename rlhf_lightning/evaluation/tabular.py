"""A policy with a free logit for every decision, on random problems whose every response is written down.

Nothing is estimated and no network is in the way: where a method ends here is where its formula leads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.optimum import exact_kl, kl_optimum

MOST = 20_000  # responses of all problems together: beyond, a step over all pairs of them takes seconds


@dataclass(frozen=True)
class Problem:
    """Random references and rewards; every response has ``length`` tokens.

    Attributes:
        tokens: Of the vocabulary.
        length: Of a response.
        beta: Weight of the KL.
        seed: Of the random numbers.
        prompts: Problems that are solved side by side; figures are means over them.
        spread: Standard deviation of the reference's logits.
    """

    tokens: int = 8
    length: int = 1
    beta: float = 0.5
    seed: int = 0
    prompts: int = 1
    spread: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what can't be enumerated."""
        if min(self.tokens - 1, self.length, self.prompts) < 1 or not self.beta > 0 or not self.spread >= 0:
            raise UserError(f"a problem has two tokens or more, a positive length, beta and number of prompts: {self}")
        if self.prompts * self.responses > MOST:
            raise UserError(
                f"{self.prompts * self.responses} responses are too many to write down, {MOST} are the most: {self}"
            )

    @property
    def responses(self) -> int:
        return int(self.tokens**self.length)

    @property
    def prefixes(self) -> int:
        """Decisions of one prompt: one for every beginning of a response."""
        return sum(self.tokens**t for t in range(self.length))

    def draw(self) -> tuple[Tensor, Tensor]:
        """The reference's logits (prompts, prefixes, tokens) and the rewards (prompts, responses), float64.

        Rewards are independent, with mean 0 and standard deviation 1 in each prompt.
        """
        generator = torch.Generator().manual_seed(self.seed)
        logits = torch.randn(self.prompts, self.prefixes, self.tokens, generator=generator, dtype=torch.float64)
        rewards = torch.randn(self.prompts, self.responses, generator=generator, dtype=torch.float64)
        centred = rewards - rewards.mean(dim=1, keepdim=True)
        return self.spread * logits, centred / centred.std(dim=1, keepdim=True)

    def token_logps(self, logits: Tensor) -> Tensor:
        """Log-probabilities of the tokens of every response, in the order of numbers written with that many digits.

        Args:
            logits: One row a prefix, the empty one first, shorter ones before longer. Shape (prompts, prefixes, tokens).

        Returns:
            Shape (prompts, responses, length), nats.
        """
        number = torch.arange(self.responses)
        first = [sum(self.tokens**s for s in range(t)) for t in range(self.length)]
        row = torch.stack([first[t] + number // self.tokens ** (self.length - t) for t in range(self.length)], dim=1)
        digit = [number // self.tokens ** (self.length - t - 1) % self.tokens for t in range(self.length)]
        return logits.log_softmax(dim=2)[:, row, torch.stack(digit, dim=1)]


@dataclass(frozen=True)
class Standing:
    """Where a policy stands on a problem, as a loss sees it.

    Attributes:
        logps: Of the tokens of every response, with gradient. Shape (prompts, responses, length), nats.
        ref_logps: Of the reference. Same shape.
        rewards: Shape (prompts, responses).
        beta: Weight of the KL.
    """

    logps: Tensor
    ref_logps: Tensor
    rewards: Tensor
    beta: float

    @property
    def probabilities(self) -> Tensor:
        """Of the responses, without gradient: how often each would be sampled. Shape (prompts, responses)."""
        return self.logps.detach().sum(dim=2).exp()

    @property
    def token_ratios(self) -> Tensor:
        """log policy - log reference of each token. Shape of ``logps``."""
        return self.logps - self.ref_logps

    @property
    def ratios(self) -> Tensor:
        """The same of each response. Shape (prompts, responses)."""
        return self.token_ratios.sum(dim=2)


Loss = Callable[[Standing], Tensor]


@dataclass(frozen=True)
class Descent:
    """Steps along exact gradients, from the reference on.

    Where an update is no gradient of anything, as with k2 or k3 in the reward, its fixed points are many, and the rule decides
    which one is reached.

    Attributes:
        rule: "adam", whose rate is constant for a third of the steps and then falls to nothing, or plain "gradient" descent.
        steps: How many.
        lr: Rate, at the start.
    """

    rule: Literal["adam", "gradient"] = "adam"
    steps: int = 1500
    lr: float = 0.1

    def run(self, problem: Problem, loss: Loss) -> Tensor:
        """Where a loss ends: log-probabilities of the responses (prompts, responses), nats.

        Args:
            problem: What is solved.
            loss: A scalar whose gradient is the expected update; the sum over prompts.
        """
        ref_logits, rewards = problem.draw()
        ref_logps = problem.token_logps(ref_logits)
        logits = ref_logits.clone().requires_grad_()
        optimizer: torch.optim.Optimizer = torch.optim.SGD([logits], lr=self.lr)
        if (
            self.rule == "adam"
        ):  # gradients without noise need no long memory, and small ones are to count as large ones do
            optimizer = torch.optim.Adam([logits], lr=self.lr, betas=(0.8, 0.9), eps=1e-20)
        for step in range(self.steps):
            if self.rule == "adam":
                optimizer.param_groups[0]["lr"] = self.lr * 1e-7 ** max(0.0, 1.5 * step / self.steps - 0.5)
            at = Standing(problem.token_logps(logits), ref_logps, rewards, problem.beta)
            (logits.grad,) = torch.autograd.grad(loss(at), logits)
            optimizer.step()
        return problem.token_logps(logits.detach()).sum(dim=2)


def distance(problem: Problem, logps: Tensor) -> float:
    """KL from a policy to the optimum of ``E[reward] - beta KL(policy || reference)``, mean over the prompts, nats."""
    ref_logits, rewards = problem.draw()
    ref_logps = problem.token_logps(ref_logits).sum(dim=2)
    optimum, _ = kl_optimum(ref_logps, rewards, beta=problem.beta)
    return float(exact_kl(logps, optimum).mean())
