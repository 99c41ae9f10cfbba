"""The plain loop that one writes first: transformers, padded batches, logits of every position, no trainer."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

from benchmarks import group_losses
from benchmarks.forced import multinomial_as_told, script_of
from benchmarks.measure import Meter
from benchmarks.problem import DPO_BETA, EOS, KL_COEF, LR, MAX_GRAD_NORM, PAD, Spec, crossed, odd_share, sequences

Rows = list[dict[str, list[int]]]


def run(spec: Spec, meter: Meter) -> None:
    """All steps of the method."""
    {"sft": sft, "reward": reward, "dpo": dpo, "kto": kto, "ppo": ppo, "grpo": grouped, "rloo": grouped}[spec.method](
        spec, meter
    )


def causal(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def scalar(spec: Spec) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(spec.scalar, num_labels=1)


def autocast(spec: Spec) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=spec.precision == "bf16")


def padded(pairs: list[tuple[list[int], list[int]]], meter: Meter) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and response mask of prompts with responses, padded on the right."""
    width = max(len(prompt) + len(response) for prompt, response in pairs)
    ids, mask, responses = [], [], []
    for prompt, response in pairs:
        rest = width - len(prompt) - len(response)
        ids.append([*prompt, *response, *[PAD] * rest])
        mask.append([1] * (width - rest) + [0] * rest)
        responses.append([0] * len(prompt) + [1] * len(response) + [0] * rest)
    meter.fed(len(pairs) * width)
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(responses).bool()


def token_logprobs(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Of every token but the first. Shape (batch, length - 1)."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    logits = output.logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def train(spec: Spec, meter: Meter, model: Any, loss_of: Callable[[Rows], Tensor]) -> None:
    """Steps of AdamW on the mean loss of each batch."""
    head = model.lm_head.weight if hasattr(model, "lm_head") else None
    meter.watch(head, model.model.layers[0].self_attn.q_proj.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    for rows in spec.batches():
        with meter.step():
            with autocast(spec):
                loss = loss_of(rows)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            meter.compare(float(loss), float(norm))


def both(spec: Spec, rows: Rows) -> list[tuple[list[int], list[int]]]:
    """The chosen responses, then the rejected ones."""
    pairs = [sequences(spec.method, row) for row in rows]
    return [pair[0] for pair in pairs] + [pair[1] for pair in pairs]


def sft(spec: Spec, meter: Meter) -> None:
    model = causal(spec.policy)

    def loss_of(rows: Rows) -> Tensor:
        ids, mask, responses = padded([pair for row in rows for pair in sequences("sft", row)], meter)
        labels = ids.masked_fill(~responses, -100)[:, 1:]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    train(spec, meter, model, loss_of)


def reward(spec: Spec, meter: Meter) -> None:
    model = scalar(spec)

    def loss_of(rows: Rows) -> Tensor:
        ids, mask, _ = padded(both(spec, rows), meter)
        chosen, rejected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.squeeze(-1).chunk(2)
        return -F.logsigmoid((chosen - rejected).float()).mean()

    train(spec, meter, model, loss_of)


def dpo(spec: Spec, meter: Meter) -> None:
    model, reference = causal(spec.policy), causal(spec.reference)

    def loss_of(rows: Rows) -> Tensor:
        ids, mask, responses = padded(both(spec, rows), meter)
        with torch.no_grad():
            old = token_logprobs(reference, ids, mask)
        ratios = ((token_logprobs(model, ids, mask) - old) * responses[:, 1:]).sum(1)
        chosen, rejected = ratios.chunk(2)
        return -F.logsigmoid(DPO_BETA * (chosen - rejected)).mean()

    train(spec, meter, model, loss_of)


def kto(spec: Spec, meter: Meter) -> None:
    """The chosen are liked, the rejected are not."""
    model, reference = causal(spec.policy), causal(spec.reference)

    def loss_of(rows: Rows) -> Tensor:
        pairs = both(spec, rows)
        ids, mask, responses = padded(pairs + crossed(pairs), meter)
        with torch.no_grad():
            old = (token_logprobs(reference, ids, mask) * responses[:, 1:]).sum(1)
            other = (token_logprobs(model, ids[len(pairs) :], mask[len(pairs) :]) * responses[len(pairs) :, 1:]).sum(1)
            z0 = (other - old[len(pairs) :]).mean().clamp(min=0)
        own = (token_logprobs(model, ids[: len(pairs)], mask[: len(pairs)]) * responses[: len(pairs), 1:]).sum(1)
        liked, disliked = (own - old[: len(pairs)]).chunk(2)
        return torch.cat(
            [1 - torch.sigmoid(DPO_BETA * (liked - z0)), 1 - torch.sigmoid(DPO_BETA * (z0 - disliked))]
        ).mean()

    train(spec, meter, model, loss_of)


# ---------------------------------------------------------------- PPO


def ppo(spec: Spec, meter: Meter) -> None:
    """Generation by ``generate``, then full logits over padded batches in every pass."""
    model, reference, critic, judge = causal(spec.policy), causal(spec.policy), scalar(spec), scalar(spec)
    meter.watch(model.lm_head.weight, model.model.layers[0].self_attn.q_proj.weight)
    optimizer = torch.optim.AdamW([*model.parameters(), *critic.parameters()], lr=LR, weight_decay=0.0)
    for rows in spec.batches():
        with meter.step(), autocast(spec):
            with meter.phase("generation"):
                ids, mask, responses = generate(spec, model, rows)
                meter.fed(ids.numel())
            with meter.phase("scoring"), torch.no_grad():
                old = token_logprobs(model, ids, mask)
                ref = token_logprobs(reference, ids, mask)
                values = values_of(critic, ids, mask)
                scores = values_of(judge, ids, mask, before=False)[torch.arange(len(ids)), last(responses)]
                rewards = (-KL_COEF * (old - ref)) * responses[:, 1:]
                rewards[torch.arange(len(ids)), last(responses) - 1] += scores
                advantages, returns = estimate(rewards, values, responses[:, 1:])
            with meter.phase("update"):
                for _ in range(spec.shape.epochs):
                    logprobs, now = token_logprobs(model, ids, mask), values_of(critic, ids, mask)
                    policy, value = losses(logprobs, old, now, values, advantages, returns, responses[:, 1:])
                    optimizer.zero_grad()
                    (policy + 0.1 * value).backward()
                    grads = [p.grad for p in model.parameters() if p.grad is not None]
                    meter.compare(float(value), float(torch.nn.utils.get_total_norm(grads)))
                    optimizer.step()


def grouped(spec: Spec, meter: Meter) -> None:
    """GRPO and RLOO: generation by ``generate``, then full logits over padded batches."""
    model, reference = causal(spec.policy), causal(spec.policy)
    meter.watch(model.lm_head.weight, model.model.layers[0].self_attn.q_proj.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    for rows in spec.batches():
        with meter.step(), autocast(spec):
            with meter.phase("generation"):
                ids, mask, responses = generate(spec, model, rows)
                meter.fed(ids.numel())
            counted = responses[:, 1:]
            lengths = counted.sum(1)
            with meter.phase("scoring"), torch.no_grad():
                old, ref = (token_logprobs(network, ids, mask)[counted] for network in (model, reference))
                scores = torch.tensor(odd_share([row["chosen_ids"] for row in rows]))
                advantages = group_losses.advantages(spec, scores, group_losses.sums(old - ref, lengths))
            with meter.phase("update"):
                logprobs = token_logprobs(model, ids, mask)[counted]
                group_losses.loss(spec, logprobs, old, ref, advantages, lengths).backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
                optimizer.step()
                optimizer.zero_grad()
            meter.compare(float(advantages.abs().mean()), float(norm))


def generate(spec: Spec, model: Any, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Left-padded prompts with their responses, attention mask and response mask."""
    width = max(len(row["prompt_ids"]) for row in rows)
    prompts = torch.tensor([[PAD] * (width - len(row["prompt_ids"])) + row["prompt_ids"] for row in rows])
    config = GenerationConfig(
        max_new_tokens=spec.shape.response.most, do_sample=True, top_k=0, eos_token_id=EOS, pad_token_id=PAD
    )
    with torch.no_grad(), multinomial_as_told(script_of(rows)):
        ids = model.generate(inputs=prompts, attention_mask=(prompts != PAD).long(), generation_config=config)
    mask = ids != PAD
    responses = mask & (torch.arange(ids.shape[1]) >= width)
    return ids, mask.long(), responses


def values_of(model: Any, ids: Tensor, mask: Tensor, before: bool = True) -> Tensor:
    """Of every position, or of the position before every token but the first."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = model.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    values: Tensor = model.score(hidden).squeeze(-1).float()
    return values[:, :-1] if before else values


def last(mask: Tensor) -> Tensor:
    """Column of the last True of each row."""
    return (mask * torch.arange(mask.shape[1])).argmax(1)


def estimate(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Whitened Monte-Carlo advantages (lambda 1, gamma 1) and returns."""
    returns = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    advantages = (returns - values) * mask
    count = mask.sum()
    mean = advantages.sum() / count
    variance = ((advantages - mean).square() * mask).sum() / (count - 1)
    return (advantages - mean) * torch.rsqrt(variance + 1e-8) * mask, returns


def losses(
    logprobs: Tensor, old: Tensor, values: Tensor, before: Tensor, advantages: Tensor, returns: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """PPO's clipped losses, token means over ``mask``."""
    ratio = ((logprobs - old) * mask).exp()
    policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    clipped = before + (values - before).clamp(-0.2, 0.2)
    value = 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())
    return (policy * mask).sum() / mask.sum(), (value * mask).sum() / mask.sum()
