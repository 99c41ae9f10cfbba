"""The limit: a loop by hand over :mod:`.bare_llama`; no trainer, no padding, no logits that nothing asks for."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import group_losses
from benchmarks.bare_generation import generate
from benchmarks.bare_llama import BareLlama, CrossEntropy, Flat
from benchmarks.measure import Meter
from benchmarks.problem import DPO_BETA, KL_COEF, LR, MAX_GRAD_NORM, Spec, crossed, odd_share, sequences

Rows = list[dict[str, list[int]]]


def run(spec: Spec, meter: Meter) -> None:
    """All steps of the method."""
    {"sft": sft, "reward": reward, "dpo": dpo, "kto": kto, "ppo": ppo, "grpo": grouped, "rloo": grouped}[spec.method](
        spec, meter
    )


def load(spec: Spec, folder: str, trained: bool = True) -> BareLlama:
    return BareLlama(folder, torch.bfloat16 if spec.precision == "bf16" else torch.float32, trained)


def adamw(parameters: list[Tensor]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)


def flat(pairs: list[tuple[list[int], list[int]]], meter: Meter) -> Flat:
    made = Flat.of(pairs)
    meter.fed(len(made.ids))
    return made


def both(spec: Spec, rows: Rows) -> list[tuple[list[int], list[int]]]:
    """The chosen responses, then the rejected ones."""
    pairs = [sequences(spec.method, row) for row in rows]
    return [pair[0] for pair in pairs] + [pair[1] for pair in pairs]


def train(spec: Spec, meter: Meter, model: BareLlama, loss_of: Callable[[Rows], Tensor]) -> None:
    """Steps of AdamW on the mean loss of each batch."""
    meter.watch(None if "score" in model.weights else model.head, model.weights["0.qkv"])
    optimizer = adamw(model.parameters())
    for rows in spec.batches():
        with meter.step():
            loss = loss_of(rows)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            meter.compare(float(loss), float(norm))


def sft(spec: Spec, meter: Meter) -> None:
    model = load(spec, spec.policy)

    def loss_of(rows: Rows) -> Tensor:
        batch = flat([pair for row in rows for pair in sequences("sft", row)], meter)
        hidden = model.hidden(batch)[batch.scored]
        loss: Tensor = CrossEntropy.apply(hidden.to(model.dtype), model.head.to(model.dtype), batch.targets)
        return loss

    train(spec, meter, model, loss_of)


def reward(spec: Spec, meter: Meter) -> None:
    model = load(spec, spec.scalar)

    def loss_of(rows: Rows) -> Tensor:
        batch = flat(both(spec, rows), meter)
        chosen, rejected = model.values(model.hidden(batch)[ends(batch)]).chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()

    train(spec, meter, model, loss_of)


def dpo(spec: Spec, meter: Meter) -> None:
    model, reference = load(spec, spec.policy), load(spec, spec.reference, trained=False)

    def loss_of(rows: Rows) -> Tensor:
        pairs = both(spec, rows)
        batch = flat(pairs, meter)
        with torch.no_grad():
            old = reference.logprobs(reference.hidden(batch)[batch.scored], batch.targets)
        ratio = model.logprobs(model.hidden(batch)[batch.scored], batch.targets) - old
        row = torch.repeat_interleave(torch.tensor([len(response) for _, response in pairs]))
        chosen, rejected = torch.zeros(len(pairs)).index_add(0, row, ratio).chunk(2)
        return -F.logsigmoid(DPO_BETA * (chosen - rejected)).mean()

    train(spec, meter, model, loss_of)


def kto(spec: Spec, meter: Meter) -> None:
    model, reference = load(spec, spec.policy), load(spec, spec.reference, trained=False)

    def logps(network: BareLlama, batch: Flat, pairs: list[tuple[list[int], list[int]]]) -> Tensor:
        row = torch.repeat_interleave(torch.tensor([len(response) for _, response in pairs]))
        tokens = network.logprobs(network.hidden(batch)[batch.scored], batch.targets)
        return torch.zeros(len(pairs)).index_add(0, row, tokens)

    def loss_of(rows: Rows) -> Tensor:
        pairs = both(spec, rows)
        others = crossed(pairs)
        own, other = Flat.of(pairs), Flat.of(others)
        meter.fed(len(own.ids) + len(other.ids))
        with torch.no_grad():
            old = logps(reference, own, pairs)
            z0 = (logps(model, other, others) - logps(reference, other, others)).mean().clamp(min=0)
        liked, disliked = (logps(model, own, pairs) - old).chunk(2)
        return torch.cat(
            [1 - torch.sigmoid(DPO_BETA * (liked - z0)), 1 - torch.sigmoid(DPO_BETA * (z0 - disliked))]
        ).mean()

    train(spec, meter, model, loss_of)


def ends(batch: Flat) -> Tensor:
    """Position of the last token of each row."""
    return torch.tensor(batch.lengths).cumsum(0) - 1


# ---------------------------------------------------------------- PPO


def ppo(spec: Spec, meter: Meter) -> None:
    """Old log-probabilities are kept at sampling; reference, critic and reward model read the flat batch once."""
    model, critic = load(spec, spec.policy), load(spec, spec.scalar)
    reference, judge = load(spec, spec.policy, trained=False), load(spec, spec.scalar, trained=False)
    meter.watch(model.head, model.weights["0.qkv"])
    optimizer = adamw([*model.parameters(), *critic.parameters()])
    for rows in spec.batches():
        with meter.step():
            with meter.phase("generation"):
                drawn, old = generate(model, rows, spec.shape.response.most)
            with meter.phase("scoring"), torch.no_grad():
                batch = flat([(row["prompt_ids"], ids) for row, ids in zip(rows, drawn, strict=True)], meter)
                before = critic.values(critic.hidden(batch)[batch.scored])
                rewards = -KL_COEF * (old - reference.logprobs(reference.hidden(batch)[batch.scored], batch.targets))
                scores = judge.values(judge.hidden(batch)[ends(batch)])
                advantages, returns = estimate(rewards, scores, before, [len(ids) for ids in drawn])
            with meter.phase("update"):
                for _ in range(spec.shape.epochs):
                    logprobs = model.logprobs(model.hidden(batch)[batch.scored], batch.targets)
                    values = critic.values(critic.hidden(batch)[batch.scored])
                    policy, value = losses(logprobs, old, values, before, advantages, returns)
                    optimizer.zero_grad()
                    (policy + 0.1 * value).backward()
                    if meter.done == 0:
                        grads = [p.grad for p in model.parameters() if p.grad is not None]
                        meter.compare(float(value), float(torch.nn.utils.get_total_norm(grads)))
                    optimizer.step()


def estimate(rewards: Tensor, scores: Tensor, values: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Whitened Monte-Carlo advantages (lambda 1, gamma 1) and returns of the flat response tokens."""
    returns: Any = []
    for row, score in zip(rewards.split(lengths), scores, strict=True):
        returns.append(row.flip(0).cumsum(0).flip(0) + score)
    returns = torch.cat(returns)
    advantages = returns - values
    return (advantages - advantages.mean()) * torch.rsqrt(advantages.var() + 1e-8), returns


def losses(
    logprobs: Tensor, old: Tensor, values: Tensor, before: Tensor, advantages: Tensor, returns: Tensor
) -> tuple[Tensor, Tensor]:
    """PPO's clipped losses, means over response tokens."""
    ratio = (logprobs - old).exp()
    policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean()
    clipped = before + (values - before).clamp(-0.2, 0.2)
    return policy, 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square()).mean()


# ---------------------------------------------------------------- GRPO and RLOO


def grouped(spec: Spec, meter: Meter) -> None:
    """Old log-probabilities are kept at sampling; the reference reads the flat batch once."""
    model, reference = load(spec, spec.policy), load(spec, spec.policy, trained=False)
    meter.watch(model.head, model.weights["0.qkv"])
    optimizer = adamw(model.parameters())
    for rows in spec.batches():
        with meter.step():
            with meter.phase("generation"):
                drawn, old = generate(model, rows, spec.shape.response.most)
            lengths = torch.tensor([len(ids) for ids in drawn])
            with meter.phase("scoring"), torch.no_grad():
                batch = flat([(row["prompt_ids"], ids) for row, ids in zip(rows, drawn, strict=True)], meter)
                ref = reference.logprobs(reference.hidden(batch)[batch.scored], batch.targets)
                scores = torch.tensor(odd_share(drawn))
                advantages = group_losses.advantages(spec, scores, group_losses.sums(old - ref, lengths))
            with meter.phase("update"):
                logprobs = model.logprobs(model.hidden(batch)[batch.scored], batch.targets)
                group_losses.loss(spec, logprobs, old, ref, advantages, lengths).backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
                optimizer.step()
                optimizer.zero_grad()
            meter.compare(float(advantages.abs().mean()), float(norm))
