"""Every method once more, as a loop over single sequences: no padding, no packing, no batch, no code of the package.

Networks are plain transformers models in float64. Formulas are written out from the papers that the losses name.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tests.invariance.rearrangements import EOS, PLAIN, ROWS, STEP
from tests.invariance.subjects import (
    ANNOTATED,
    ANSWERS,
    CHOSEN,
    DEMONSTRATIONS,
    LONGEST,
    PREFERENCES,
    PROMPTS,
    RANKED,
    RANKINGS,
    SOLUTIONS,
    SUBJECTS,
    UNPAIRED,
    WEIGHTED,
    configured,
)

SMOOTHING, BETA, LIKED, DISLIKED, TEMPERATURE, GROUP = 0.1, 0.3, 1.2, 0.8, 0.7, 3
STEPS = range(STEP), range(STEP, ROWS)  # rows of each optimizer step


def response_logps(network: Any, prompt: list[int], response: list[int], temperature: float = 1.0) -> Tensor:
    """Log-probability of each response token."""
    logits = network(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


def raw_scores(network: Any, ids: list[int]) -> Tensor:
    """The scalar head at every position."""
    states = network.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    return network.score(states)[:, 0]


class Loop:
    """One method, step by step. ``loss`` is what the optimizer steps on; it may use what earlier steps left in ``seen``."""

    def __init__(self, name: str, scalar: str) -> None:
        self.subject, self.seen = SUBJECTS[name], list[Tensor]()
        module = configured(self.subject, "rotary", scalar, PLAIN).double()
        self.module, self.weights = module, dict(module.named_parameters())
        self.network = getattr(module, "network", None) or module.policy
        self.network = getattr(self.network, "network", None)
        reference = getattr(module, "reference", None)
        self.reference = None if reference is None else reference.network.double().network

    def steps(self, loss: Callable[["Loop", range], Tensor], passes: int = 1) -> list[dict[str, Tensor]]:
        """The gradients of all optimizer steps, by the names of the weights."""
        found = []
        for rows in STEPS:
            for _ in range(passes):
                for weight in self.weights.values():
                    weight.grad = None
                loss(self, rows).backward()
                found.append({k: w.grad.clone() for k, w in self.weights.items() if w.grad is not None})
                with torch.no_grad():
                    for weight in self.weights.values():
                        if weight.grad is not None:
                            weight -= self.subject.lr * weight.grad
        return found

    def log_ratio(self, prompt: list[int], response: list[int], temperature: float = 1.0) -> Tensor:
        """Log-ratio of a response: log policy - log reference, summed over its tokens."""
        with torch.no_grad():
            reference = response_logps(self.reference, prompt, response, temperature).sum()
        return response_logps(self.network, prompt, response, temperature).sum() - reference


# ---------------------------------------------------------------- methods that read rows


def sft(loop: Loop, rows: range) -> Tensor:
    total = sum(len(CHOSEN[row]) for row in rows)
    return -sum(response_logps(loop.network, PROMPTS[row], CHOSEN[row]).sum() for row in rows) / total


def weighted_sft(loop: Loop, rows: range) -> Tensor:
    weight = WEIGHTED["weight"]
    total = sum(weight[row] * len(CHOSEN[row]) for row in rows)
    return -sum(weight[row] * response_logps(loop.network, PROMPTS[row], CHOSEN[row]).sum() for row in rows) / total


def process_reward(loop: Loop, rows: range) -> Tensor:
    losses = []
    for row in rows:
        scores = raw_scores(loop.network, SOLUTIONS["input_ids"][row])
        for place, label in zip(SOLUTIONS["label_at"][row], SOLUTIONS["labels"][row], strict=True):
            losses.append(-label * logsigmoid(scores[place]) - (1 - label) * logsigmoid(-scores[place]))
    return torch.stack(losses).mean()


def reward_model(loop: Loop, rows: range) -> Tensor:
    """Soft labels, margins, weights and centring (Ouyang eq. 1, Touvron eq. 2, Eisenstein eq. 2)."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        better = raw_scores(loop.network, PROMPTS[row] + ANNOTATED["chosen_ids"][row])[-1]
        worse = raw_scores(loop.network, PROMPTS[row] + ANNOTATED["rejected_ids"][row])[-1]
        p, lead = ANNOTATED["chosen_probability"][row], better - worse - 0.7 * ANNOTATED["margin"][row]
        loss = -p * logsigmoid(lead) - (1 - p) * logsigmoid(-lead) + 0.05 * (better + worse) ** 2
        total = total + ANNOTATED["weight"][row] * loss
    return total / len(rows)


def plackett_luce(loop: Loop, rows: range) -> Tensor:
    """Each response against itself and all that are ranked worse."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        scores = torch.stack([raw_scores(loop.network, PROMPTS[row] + answer)[-1] for answer in RANKED[row]])
        for score, rank in zip(scores, RANKINGS["ranks"][row], strict=True):
            worse = [other for other, their in zip(scores, RANKINGS["ranks"][row], strict=True) if their > rank]
            total = total + RANKINGS["weight"][row] * (torch.stack([score, *worse]).logsumexp(0) - score)
    return total / len(rows)


def outcome(loop: Loop, rows: range) -> Tensor:
    losses = []
    for row in rows:
        score = raw_scores(loop.network, PROMPTS[row] + UNPAIRED["completion_ids"][row])[-1]
        losses.append(-logsigmoid(score if UNPAIRED["label"][row] else -score))
    return torch.stack(losses).mean()


def of_pairs(formula: Callable[[Tensor], Tensor]) -> Callable[[Loop, range], Tensor]:
    """The mean over pairs of a formula of the difference of log-ratios."""

    def loss(loop: Loop, rows: range) -> Tensor:
        gaps = [
            loop.log_ratio(PROMPTS[row], PREFERENCES["chosen_ids"][row])
            - loop.log_ratio(PROMPTS[row], PREFERENCES["rejected_ids"][row])
            for row in rows
        ]
        return torch.stack([formula(gap) for gap in gaps]).mean()

    return loss


def smoothed_dpo(gap: Tensor) -> Tensor:
    return -(1 - SMOOTHING) * logsigmoid(BETA * gap) - SMOOTHING * logsigmoid(-BETA * gap)


def simpo(loop: Loop, rows: range) -> Tensor:
    means = [
        [response_logps(loop.network, PROMPTS[row], PREFERENCES[side][row]).mean() for side in ("chosen_ids", "rejected_ids")]
        for row in rows
    ]  # fmt: skip
    return torch.stack([-logsigmoid(2.0 * (chosen - rejected) - 1.0) for chosen, rejected in means]).mean()


def of_answers(loop: Loop, rows: range) -> list[tuple[Tensor, float, float]]:
    """Log-ratio, sign and weight of each labelled answer."""
    return [
        (
            loop.log_ratio(PROMPTS[row], UNPAIRED["completion_ids"][row]),
            1.0 if UNPAIRED["label"][row] else -1.0,
            LIKED if UNPAIRED["label"][row] else DISLIKED,
        )
        for row in rows
    ]


def kto(loop: Loop, rows: range) -> Tensor:
    """Around the mean log-ratio of each prompt with the answer of the row before it, at least 0 (Ethayarajh eq. 8)."""
    before = [rows[-1], *rows[:-1]]
    with torch.no_grad():
        crossed = [
            loop.log_ratio(PROMPTS[row], UNPAIRED["completion_ids"][b]) for row, b in zip(rows, before, strict=True)
        ]
    point = torch.stack(crossed).mean().clamp(min=0)
    return torch.stack([w * torch.sigmoid(-s * BETA * (h - point)) for h, s, w in of_answers(loop, rows)]).mean()


def apo_zero(loop: Loop, rows: range) -> Tensor:
    return torch.stack([w * torch.sigmoid(-s * BETA * h) for h, s, w in of_answers(loop, rows)]).mean()


def bco(loop: Loop, rows: range) -> Tensor:
    """Around the mean reward of all answers of the steps before (Jung eq. 9)."""
    answers = of_answers(loop, rows)
    shift = torch.stack(loop.seen).mean() if loop.seen else torch.zeros((), dtype=torch.float64)
    loop.seen += [h.detach() for h, _, _ in answers]
    return torch.stack([-w * logsigmoid(s * BETA * (h - shift)) for h, s, w in answers]).mean()


# ---------------------------------------------------------------- online DPO


def drawn(row: int) -> list[list[int]]:
    """The responses to a prompt: those that the scripted engine gives to those who ask three times."""
    return [ANSWERS[(row + 5 * draw) % ROWS] for draw in range(GROUP)]


def best_and_worst(row: int) -> tuple[int, int] | None:
    """Which responses make the pair of a prompt; None where all tie. A response without an end ranks below all others."""
    rank = []
    for ids in drawn(row):
        ended = ids[-1] == EOS and len(ids) <= LONGEST
        rank.append(score_of(row, ids) if ended else -math.inf)
    return None if max(rank) == min(rank) else (rank.index(max(rank)), rank.index(min(rank)))


def score_of(row: int, ids: list[int]) -> float:
    return sum(ids) % 7 / 2 - 1 + row / 10


def pairs_of(rows: range) -> list[tuple[int, list[int], list[int]]]:
    """Prompt, chosen and rejected of every group that teaches."""
    found = [(row, best_and_worst(row)) for row in rows]
    return [(row, drawn(row)[pair[0]], drawn(row)[pair[1]]) for row, pair in found if pair is not None]


def online_dpo(loop: Loop, rows: range) -> Tensor:
    """The mean over the pairs that teach; at the temperature that they were sampled at (Guo eq. 6)."""
    ratios = [
        [loop.log_ratio(PROMPTS[row], ids, TEMPERATURE) for ids in (chosen, rejected)]
        for row, chosen, rejected in pairs_of(rows)
    ]
    return torch.stack([smoothed_dpo(chosen - rejected) for chosen, rejected in ratios]).mean()


def online_cpo(loop: Loop, rows: range) -> Tensor:
    """The contrast and a tenth of the chosen response's likelihood, which a tie would have too."""
    logps = [
        [response_logps(loop.network, PROMPTS[row], ids, TEMPERATURE).sum() for ids in (chosen, rejected)]
        for row, chosen, rejected in pairs_of(rows)
    ]
    return torch.stack([-logsigmoid(BETA * (chosen - rejected)) - 0.1 * chosen for chosen, rejected in logps]).mean()


LOOPS: dict[str, Callable[[Loop, range], Tensor]] = {
    "sft": sft,
    "sft, weighted": weighted_sft,
    "process reward": process_reward,
    "reward model": reward_model,
    "plackett-luce": plackett_luce,
    "outcome verifier": outcome,
    "dpo": of_pairs(smoothed_dpo),
    "ipo": of_pairs(lambda gap: (gap - 1 / (2 * 0.5)) ** 2),
    "kto": kto,
    "apo-zero, unpaired": apo_zero,
    "bco, unpaired": bco,
    "online dpo": online_dpo,
    "online cpo": online_cpo,
}
assert DEMONSTRATIONS["input_ids"][0] == PROMPTS[0] + CHOSEN[0]
