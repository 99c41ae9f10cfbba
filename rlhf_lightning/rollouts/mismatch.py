"""Where old log-probabilities come from, how far the sampler's are from the policy's, and the correction for it."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.policy import Correction, importance_weights
from rlhf_lightning.generation.engine import Generation, GenerationEngine
from rlhf_lightning.rollouts.buffer import Rollout

OldLogprobs = Literal["sampled", "scored", "weighed"]
Counted = dict[str, tuple[Tensor, Tensor | int]]

MEANS = ("sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/mean")
LOWEST = ("sampling/importance_sampling_ratio/min",)
TOLERANCE = 0.01  # nats; float32 gives 1e-5
HIGHEST = ("sampling/sampling_logp_difference/max", "sampling/importance_sampling_ratio/max")


@dataclass(frozen=True)
class Importance:
    """How an engine with numbers of its own is corrected for: :func:`rlhf_lightning.functional.policy.importance_weights`.

    Attributes:
        cap: Greatest importance weight.
        how: What becomes of a greater one, and whether weights are those of tokens or of whole responses.
        half_precision: For an engine that shares the policy's weights, when these compute in half precision: "score" takes the
            old log-probabilities from the training forward and only logs how far the sampler's are from them; "weigh" also
            multiplies the advantages with importance weights, as for an engine with numbers of its own.
    """

    cap: float = 2.0
    how: Correction = "token_truncate"
    half_precision: Literal["score", "weigh"] = "score"

    def __post_init__(self) -> None:
        """Refuse a bound that leaves nothing."""
        if not self.cap > 0:
            raise UserError(f"importance.cap must be positive, not {self.cap}")


def old_logprobs_from(engine: GenerationEngine, *, half: bool, importance: Importance) -> OldLogprobs:
    """Where the old log-probabilities of an update come from.

    ====================================  ==============  ===========================================================
    engine                                precision       old log-probabilities
    ====================================  ==============  ===========================================================
    shares the policy's numbers           float32         "sampled": the engine's, where it gives them with entropies
    shares the policy's numbers           half precision  "scored" by the training forward, or "weighed"
    has numbers of its own (vLLM)         any             "weighed": scored, and advantages times importance weights
    ====================================  ==============  ===========================================================

    In half precision decoding a token at a time rounds differently from a forward over whole rows, by hundredths of a nat a
    token. GSPO's clip range is 3e-4.

    Args:
        engine: What samples.
        half: Whether the policy computes in half precision.
        importance: The correction.
    """
    if not engine.same_numbers:
        return "weighed"
    if half:
        return "weighed" if importance.half_precision == "weigh" else "scored"
    return "sampled"


def compared(
    rollout: Rollout, drawn: Generation, source: OldLogprobs, importance: Importance, *, exact: bool
) -> tuple[Rollout, Counted]:
    """Measure how far the sampler is from the policy that it sampled from, and correct for it where that is asked for.

    Args:
        rollout: With advantages.
        drawn: What the engine gave.
        source: From :func:`old_logprobs_from`.
        importance: The correction.
        exact: Whether the engine should give the policy's own numbers: it shares the weights, and both compute in float32.

    Returns:
        The rollout, and sums and counts by TRL's names; none where the engine's own log-probabilities are the old ones (the
        first forward of the update measures these), or it gave none.

    Raises:
        UserError: If the two are further apart than float32 explains, or weights are wanted and the engine gave nothing to
            compute them from.
    """
    if source == "weighed":
        return weighed(rollout, drawn, importance)
    if drawn.logprobs is None or gives_old_logprobs(drawn, source):
        return rollout, {}
    if exact:
        refuse_other_numbers(rollout.logprobs, drawn.logprobs, rollout.response_mask)
    return rollout, differences(rollout.logprobs, drawn.logprobs, rollout.response_mask)


def gives_old_logprobs(drawn: Generation, source: OldLogprobs) -> bool:
    """Whether the engine's own log-probabilities serve as the old ones."""
    return source == "sampled" and drawn.logprobs is not None and drawn.entropy is not None


def weighed(rollout: Rollout, drawn: Generation, importance: Importance) -> tuple[Rollout, Counted]:
    """The rollout with its advantages times the importance weights of its tokens.

    Args:
        rollout: With advantages, and with the policy's own log-probabilities.
        drawn: What the engine gave, log-probabilities among it.
        importance: Which weights.

    Returns:
        The rollout, and sums and counts by TRL's names.

    Raises:
        UserError: If the engine gave no log-probabilities.
    """
    if drawn.logprobs is None:
        raise UserError(
            "importance weights are of the policy over the engine, which has to give the log-probabilities that it drew with"
        )
    mask = rollout.response_mask
    weights = importance_weights(rollout.logprobs, drawn.logprobs, mask, cap=importance.cap, how=importance.how)
    ratio = weights[mask]
    if not len(ratio):
        return rollout, {}
    counted: Counted = {
        "sampling/importance_sampling_ratio/min": (ratio.min(), 1),
        "sampling/importance_sampling_ratio/mean": (ratio.sum(), len(ratio)),
        "sampling/importance_sampling_ratio/max": (ratio.max(), 1),
    }
    counted |= differences(rollout.logprobs, drawn.logprobs, mask)
    return replace(rollout, advantages=rollout.advantages * weights), counted


def differences(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> Counted:
    """How far the log-probabilities are apart, as sums and counts. Shapes (batch, length); nats."""
    apart = (logprobs.detach() - sampler_logprobs)[mask].abs()
    if not len(apart):
        return {}
    return {
        "sampling/sampling_logp_difference/mean": (apart.sum(), len(apart)),
        "sampling/sampling_logp_difference/max": (apart.max(), 1),
    }


def refuse_other_numbers(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, precision: str = "32-true") -> None:
    """Make sure that an engine that is said to compute as the policy does, does.

    Half precision rounds differently in every batch, by more than a bound could tell from a fault: it is only measured.

    Args:
        logprobs: Of the policy, with the weights that sampled. Shape (batch, length), nats.
        sampler_logprobs: Of the engine. Same shape.
        mask: True on response tokens. Same shape, bool.
        precision: As Lightning calls it.

    Raises:
        UserError: If they are further apart than float32 explains.
    """
    if precision.startswith(("16", "bf16", "transformer")) or logprobs.dtype not in (torch.float32, torch.float64):
        return
    apart = (logprobs.detach() - sampler_logprobs)[mask].abs()
    if not bool((apart < TOLERANCE).all()):
        raise UserError(
            f"the engine's log-probabilities are up to {float(apart.max()):.3g} nats from those of the policy that it sampled "
            "from: it does not sample what the policy computes; set sampling.engine to another of "
            "rlhf_lightning.generation.native.NativeEngine and rlhf_lightning.generation.transformers_engine.TransformersEngine"
        )
