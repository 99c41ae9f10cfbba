"""Where methods end that know every expectation, held against what is on record: who finds the optimum, and who another point.

A figure is the KL from where a method ends to the optimum of ``E[reward] - beta KL(policy || reference)``. The problems that
the figures on record are of were drawn with random numbers that nobody has any more. The exact ones hold of every problem;
the others depend on it, so the seeds of the problems here were chosen such that *one* problem a column comes near all of
its figures. Beside them stand closed forms, which have to be met whatever the problem is.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.evaluation.expected_updates import REINFORCEMENT, Pairs, kto, over_halves, over_pairs
from rlhf_lightning.evaluation.tabular import Descent, Loss, Problem, distance
from rlhf_lightning.functional.implicit_rewards import apo_zero_loss, bco_pair_loss, nca_loss, sppo_hard_loss
from rlhf_lightning.functional.optimum import forward_kl_optimum, ipo_optimum
from rlhf_lightning.functional.preference import dpo_loss, hinge_loss, ipo_loss, robust_dpo_loss
from rlhf_lightning.functional.reference_free import simpo_loss

EXACT = 1e-9  # nats: a method that finds the optimum is at most so far from it, or as far as is on record
FLIPPED = 0.1  # share of the labels, and what smoothing assumes it to be

# On record, by length of the responses: section 14.2 of the algorithms' reference, beta 0.5, 8 tokens.
ON_RECORD: dict[str, tuple[float, float]] = {
    "exact gradient": (1e-16, 9e-5),
    "k1 in the reward": (1e-16, 9e-5),
    "k2 in the loss, of sequences": (2e-16, 9e-5),
    "weighted k3 in the loss, of sequences": (2e-16, 9e-5),
    "k2 in the loss, of tokens": (2e-16, 0.236),
    "weighted k3 in the loss, of tokens": (2e-16, 0.236),
    "k3 in the loss, of tokens": (0.168, 0.675),
    "k1 in the loss": (1.31, 3.19),
    "k2 in the reward": (0.436, 1.52),
    "k3 in the reward": (1.35, 2.54),
    "GRPO: standardised, k3 of tokens": (0.348, 0.556),
    "GRPO: standardised, exact KL": (1.31, 0.262),
}


class Method(NamedTuple):
    """A preference method.

    Attributes:
        on_record: Its figures with pairs drawn from the reference, and drawn uniformly; None where there is none.
        loss: Makes its population loss.
        flipped: Share of the labels that say the opposite.
    """

    on_record: tuple[float | None, float | None]
    loss: Callable[[Tensor, float], Loss]
    flipped: float = 0.0


def paired(pair: Callable[..., Tensor], **more: float) -> Callable[[Tensor, float], Loss]:
    """A population loss of log-ratios."""
    return lambda weights, beta: over_pairs(weights, partial(pair, beta=beta, **more))


PREFERENCES: dict[str, Method] = {
    "DPO": Method((6e-18, 3e-17), paired(dpo_loss)),
    "robust DPO, flipped labels": Method((6e-18, 1e-16), paired(robust_dpo_loss, label_smoothing=FLIPPED), FLIPPED),
    "robust DPO, clean labels": Method((0.31, 0.54), paired(robust_dpo_loss, label_smoothing=FLIPPED)),
    "cDPO, clean labels": Method((0.065, 0.077), paired(dpo_loss, label_smoothing=FLIPPED)),
    "DPO, flipped labels": Method((0.065, 0.077), paired(dpo_loss), FLIPPED),
    "IPO": Method((0.656, 0.664), lambda weights, beta: over_pairs(weights, partial(ipo_loss, tau=beta))),
    "hinge": Method((0.158, 0.118), paired(hinge_loss)),
    "BCO": Method((0.189, 0.420), paired(bco_pair_loss)),
    "NCA": Method((0.363, 0.518), paired(nca_loss)),
    "SPPO": Method((0.676, 0.779), paired(sppo_hard_loss)),
    "APO-zero": Method((0.190, 0.975), paired(apo_zero_loss)),
    "KTO": Method((0.185, 1.26), lambda weights, beta: over_halves(weights, kto)),
    "SimPO": Method(
        (1.06, None),
        lambda weights, beta: over_pairs(weights, partial(simpo_loss, beta=2.0, gamma=0.5), reference_free=True),
    ),
}


class Figure(NamedTuple):
    """One number of the table.

    Attributes:
        method: What was followed to its end.
        where: On which problem.
        found: What came out.
        on_record: What is to come out; 0 for a distance to a closed form.
        exact: Whether the method, or the closed form, is to be met exactly.
    """

    method: str
    where: str
    found: float
    on_record: float
    exact: bool

    def ratio(self) -> float | None:
        """Found over on record; None of an exact one, which is rounding over rounding."""
        return None if self.exact else self.found / self.on_record

    def holds(self, tolerance: float) -> bool:
        """Whether it is within so much of its figure, or as good as zero."""
        if self.exact:
            return abs(self.found) <= max(self.on_record, EXACT)
        return abs(self.found / self.on_record - 1) <= tolerance


def reinforcement_figures(problem: Problem, descent: Descent, column: int) -> Iterator[Figure]:
    """One after the other: each method's distance to the optimum, and that of k3 in the loss to its own closed form.

    Args:
        problem: What is solved.
        descent: How.
        column: Of the record: 0 for responses of one token, 1 for three.
    """
    where = "1 token" if problem.length == 1 else f"{problem.length} tokens"
    for name, update in REINFORCEMENT.items():
        logps, on_record = descent.run(problem, update), ON_RECORD[name][column]
        yield Figure(name, where, distance(problem, logps), on_record, on_record < 1e-3)
        if name == "k3 in the loss, of tokens" and problem.length == 1:
            ref_logps, rewards = in_sums(problem)
            closed = forward_kl_optimum(ref_logps, rewards, beta=problem.beta)
            yield Figure(f"{name}: to beta ref / (lambda - r)", where, variation(logps, closed), 0.0, True)


def preference_figures(problem: Problem, descent: Descent) -> Iterator[Figure]:
    """The same of losses on pairs drawn from the reference, and uniformly; and IPO's distance to its own closed form."""
    for name, method in PREFERENCES.items():
        for rivals, on_record in zip(("reference", "uniform"), method.on_record, strict=True):
            if on_record is None:
                continue
            weights = Pairs(rivals, method.flipped).weights(problem)  # type: ignore[arg-type]
            logps = descent.run(problem, method.loss(weights, problem.beta))
            where = f"pairs, {rivals}"
            yield Figure(name, where, distance(problem, logps), on_record, on_record < 1e-3)
            if name == "IPO":
                ref_logps, rewards = in_sums(problem)
                drawn = ref_logps if rivals == "reference" else torch.zeros_like(ref_logps)
                closed = ipo_optimum(ref_logps, rewards, drawn.log_softmax(dim=1), tau=problem.beta)
                yield Figure(f"{name}: to its closed form", where, variation(logps, closed), 0.0, True)


def in_sums(problem: Problem) -> tuple[Tensor, Tensor]:
    """Log-probabilities of whole responses under the reference, and rewards. Shape (prompts, responses) each."""
    ref_logits, rewards = problem.draw()
    return problem.token_logps(ref_logits).sum(dim=2), rewards


def variation(logps: Tensor, other: Tensor) -> float:
    """Total variation between two policies, of the prompt where it is largest."""
    return float(0.5 * (logps.exp() - other.exp()).abs().sum(dim=1).max())


def table(figures: list[Figure], tolerance: float) -> str:
    """All figures as Markdown, with a verdict each."""
    rows = [["method", "problem", "found", "on record", "ratio", "verdict"], ["---"] * 6]
    for figure in figures:
        ratio = figure.ratio()
        numbers = f"{figure.found:.3g}", f"{figure.on_record:.3g}", "exact" if ratio is None else f"{ratio:.2f}"
        rows.append([figure.method, figure.where, *numbers, "holds" if figure.holds(tolerance) else "DOES NOT HOLD"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
