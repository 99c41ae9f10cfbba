"""What is asked of vLLM, in the process or over HTTP, and what its answers come to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import Generation, SamplingParameters
from rlhf_lightning.generation.stop_strings import StopStrings

NEVER = -100.0  # the lowest bias that vLLM takes
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


def requests(
    count: int,
    sampling: SamplingParameters,
    eos_ids: list[int],
    missing: Tensor | None = None,
    *,
    can_stop: bool = False,
) -> list[dict[str, Any]]:
    """vLLM's sampling parameters for each of ``count`` responses; nothing is left to the defaults of the model's folder.

    Each has a seed from torch's global generator: a response depends on that and on its prompt, not on its neighbours.

    Args:
        count: Number of responses.
        sampling: How to sample.
        eos_ids: Tokens that end a response.
        missing: Ids that no token has. Shape (n,), int64.
        can_stop: Whether vLLM has a tokenizer, without which it can't find stop strings. It then generates on, and the caller
            cuts the responses.

    Raises:
        UserError: If vLLM can't sample at this temperature, or would combine the settings differently.
    """
    if sampling.temperature and not COLDEST <= sampling.temperature <= HOTTEST:
        raise UserError(
            f"vLLM samples at temperatures from {COLDEST} to {HOTTEST}, or greedily at 0; {sampling.temperature} is neither"
        )
    if sampling.temperature and sampling.min_p and sampling.top_p < 1:
        raise UserError(
            "vLLM applies min_p before top_p, all other engines after it, so that they would sample from different "
            "distributions; set one of sampling.min_p and sampling.top_p"
        )
    fields = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": sampling.min_new_tokens,
        "stop_token_ids": eos_ids,
        "ignore_eos": True,  # what the model folder calls its end; ours are the stop tokens
        "logprobs": 0,  # of the sampled token alone
        "detokenize": False,
    }
    if can_stop and sampling.stop_strings:
        fields |= {"stop": list(sampling.stop_strings), "include_stop_str_in_output": True, "detokenize": True}
        fields |= {
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
        }  # the text that StopStrings reads
    if missing is not None:
        fields["logit_bias"] = {str(index): NEVER for index in missing.tolist()}
    if sampling.temperature == 0:
        return [fields] * count
    return [fields | {"seed": seed} for seed in torch.randint(2**62, (count,)).tolist()]


def generation(
    answers: Sequence[Answer],
    sampling: SamplingParameters,
    pad_id: int,
    device: torch.device,
    *,
    eos_ids: Sequence[int] = (),
    stops: StopStrings | None = None,
) -> Generation:
    """Answers side by side, the pad id after each end.

    Args:
        answers: What vLLM generated.
        sampling: How it was asked to sample.
        pad_id: What fills a row after its end.
        device: Where to put the result.
        eos_ids: Tokens that end a response.
        stops: Finds the stop strings, where there are some.

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
        ended = answer.finish == "length" or answer.tokens[-1] in eos_ids
        if stops is not None and not ended and stops.end(answer.tokens) is None:
            raise UserError(
                f"vLLM ended response {row} at a stop string that the policy's tokenizer does not find in its tokens; start "
                "vLLM with the policy's tokenizer"
            )
    width = max(len(answer.tokens) for answer in answers)
    tokens = torch.tensor([a.tokens + [pad_id] * (width - len(a.tokens)) for a in answers], device=device)
    if not sampling.samples_the_policy:
        return Generation(tokens)
    logprobs = torch.tensor([a.logprobs + [0.0] * (width - len(a.tokens)) for a in answers], device=device)
    return Generation(tokens, logprobs)
