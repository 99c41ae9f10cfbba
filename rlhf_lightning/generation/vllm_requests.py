"""What is asked of vLLM, in the process or over HTTP, and what its answers come to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import Generation, SamplingParameters

COLDEST, HOTTEST = 0.01, 2.0  # vLLM raises a temperature to the first and refuses one beyond the second


@dataclass(frozen=True)
class Answer:
    """One response of vLLM's.

    Attributes:
        tokens: With the end that it stopped at.
        logprobs: Of each, under the distribution that it was drawn from, nats.
        finish: "stop" at an end, "length" at the longest; anything else is a failure.
    """

    tokens: list[int]
    logprobs: list[float]
    finish: str | None


def prompts_of(input_ids: Tensor, attention_mask: Tensor) -> list[list[int]]:
    """The real tokens of each row of a padded batch, both of shape (batch, length)."""
    return [ids[real].tolist() for ids, real in zip(input_ids, attention_mask.bool(), strict=True)]


def requests(count: int, sampling: SamplingParameters, eos_ids: list[int]) -> list[dict[str, Any]]:
    """vLLM's sampling parameters for each of so many responses; nothing is left to a model folder's own defaults.

    Each has a seed from torch's global generator: a response depends on that and on its prompt, not on its neighbours.

    Raises:
        UserError: If vLLM can't sample at this temperature.
    """
    if sampling.temperature and not COLDEST <= sampling.temperature <= HOTTEST:
        raise UserError(
            f"vLLM samples at temperatures from {COLDEST} to {HOTTEST}, or greedily at 0; {sampling.temperature} is neither"
        )
    fields = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": eos_ids,
        "ignore_eos": True,  # what the model folder calls its end; ours are the stop tokens
        "logprobs": 0,  # of the sampled token alone
        "detokenize": False,
    }
    if sampling.temperature == 0:
        return [fields] * count
    return [fields | {"seed": seed} for seed in torch.randint(2**62, (count,)).tolist()]


def generation(
    answers: Sequence[Answer], sampling: SamplingParameters, pad_id: int, device: torch.device
) -> Generation:
    """Answers side by side, the pad id after each end.

    Raises:
        UserError: If one is shorter than it may be and has no end.
    """
    for row, answer in enumerate(answers):
        if answer.finish not in ("stop", "length"):
            raise UserError(
                f"vLLM gave up response {row} ({answer.finish}); see its messages above, or the server's log"
            )
        if answer.finish == "length" and len(answer.tokens) < sampling.max_new_tokens:
            raise UserError(
                f"vLLM cut response {row} off after {len(answer.tokens)} of {sampling.max_new_tokens} tokens: with its prompt"
                " it is longer than vLLM's max_model_len; raise that, or lower sampling.max_new_tokens"
            )
    width = max(len(answer.tokens) for answer in answers)
    tokens = torch.tensor([a.tokens + [pad_id] * (width - len(a.tokens)) for a in answers], device=device)
    if not sampling.samples_the_policy:
        return Generation(tokens)
    logprobs = torch.tensor([a.logprobs + [0.0] * (width - len(a.tokens)) for a in answers], device=device)
    return Generation(tokens, logprobs)
