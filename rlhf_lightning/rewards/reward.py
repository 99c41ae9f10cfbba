"""What a reward is given, what it gives back, and the check on what came."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import UserError, harmless

if TYPE_CHECKING:
    from transformers import TrainerState  # which takes seconds to import

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Samples:
    """Responses to be scored, all lists of one length.

    Attributes:
        prompts: As the dataset gave them: text, or a list of messages.
        completions: Text of the responses, without special tokens; a stop string that ended one is part of it.
        completion_ids: Token ids of the responses under the policy's tokenizer, EOS included.
        truncated: True where the response was cut off before EOS or a stop string.
        columns: Every other column of the dataset.
        extra: Columns for the table of samples that a reward has logged; filled while it scores.
        dropped_tokens: Special tokens that were sampled inside of responses and are missing in ``completions``.
        decode: From ``completion_ids`` to text with all tokens; None where there is no tokenizer.
    """

    prompts: list[Any]
    completions: list[str]
    completion_ids: list[list[int]]
    truncated: list[bool]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    dropped_tokens: tuple[str, ...] = ()
    decode: Callable[[list[list[int]]], list[str]] | None = None

    def texts(self, skip_special_tokens: bool = True) -> list[str]:
        """Text of the responses; with special tokens, the closing EOS included, if they are not skipped.

        Raises:
            UserError: If special tokens are asked for and there is no tokenizer that knows them.
        """
        if skip_special_tokens:
            return self.completions
        if self.decode is None:
            raise UserError("skip_special_tokens: false needs token ids of the policy; these responses are text alone")
        return self.decode(self.completion_ids)

    def rows(self, numbers: list[int]) -> "Samples":
        """These samples, in this order, as often as they are named."""

        def picked(values: list[Any]) -> list[Any]:
            return [values[row] for row in numbers]

        lists: dict[str, Any] = {name: picked(getattr(self, name)) for name in LISTS}
        columns, extra = ({name: picked(x) for name, x in found.items()} for found in (self.columns, self.extra))
        return replace(self, **lists, columns=columns, extra=extra)


LISTS = ("prompts", "completions", "completion_ids", "truncated")  # of Samples, with an entry for each response


class Reward(ABC):
    """Scores responses. A user's own subclass is given by its ``class_path``.

    Attributes:
        waits: Whether scoring mostly waits for other processes or servers: such rewards of a sum are scored at the same time.
        skips_special_tokens: Whether it scores the text without special tokens, so that a warning is due where some were
            sampled.
        reads_trainer_state: Whether :meth:`set_trainer_state` does something.
        logs_metrics: Whether :meth:`logged_metrics` may return something; the same on all ranks.
    """

    waits: bool = False
    skips_special_tokens: bool = True
    reads_trainer_state: bool = False
    logs_metrics: bool = False
    _warned_of_dropped_tokens: bool = False

    @property
    def name(self) -> str:
        """What its scores are logged under."""
        return type(self).__name__

    @property
    def title(self) -> str:
        """What a report calls it, in a sentence such as "PPO raised the ..."."""
        return self.name if self.name.lower().endswith(("reward", "rewards")) else f"reward {self.name}"

    def prepare(self, device: torch.device | str) -> None:  # noqa: B027  (most rewards have nothing to load)
        """Load what is needed, on this device. Called once, before the first score."""

    def networks(self) -> list[nn.Module]:
        """Networks that it scores with, which may be in shards: whoever calls ``score`` gathers them first."""
        return []

    def set_trainer_state(self, state: "TrainerState") -> None:  # noqa: B027  (most rewards do not depend on it)
        """Receive where the training is; called before each score."""

    def logged_metrics(self) -> dict[str, list[float]]:
        """Scalars that the reward itself has logged while it scored last, by name."""
        return {}

    def parts(self) -> dict[str, Tensor]:
        """What the last scores were made of, by name, shape (samples,) each; nothing for a single reward."""
        return {}

    @abstractmethod
    def score(self, samples: Samples) -> Tensor | list[float | None]:
        """Score each sample; higher is better.

        Returns:
            Shape (len(samples.prompts),), float32; or a list, with None for a sample to which this reward does not apply.
        """


def applicable_scores(reward: Reward, samples: Samples) -> tuple[Tensor, Tensor]:
    """``reward.score`` held against what was asked for.

    Returns:
        The scores, 0 where the reward does not apply, and where it does. Shape (samples,), float32 and bool.

    Raises:
        UserError: If the number of scores is wrong or one is not a finite number; names the reward and the sample.
    """
    warn_of_dropped_tokens(reward, samples)
    given = reward.score(samples)
    expected = len(samples.prompts)
    if isinstance(given, list):
        applies = torch.tensor([score is not None for score in given], dtype=torch.bool)
        scores = torch.tensor([score if score is not None else 0.0 for score in given], dtype=torch.float32)
    else:
        scores = torch.as_tensor(given, dtype=torch.float32)
        applies = torch.ones(scores.shape, dtype=torch.bool)
    if scores.shape != (expected,):
        raise UserError(
            f"{reward.name} returned scores of shape {tuple(scores.shape)} for {expected} samples; one each is due"
        )
    bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
    if bad:
        first = bad[0]
        raise UserError(
            f"{reward.name} returned {scores[first].item()} for {len(bad)} of {expected} samples, first for the response "
            f"{samples.completions[first][:80]!r}; return a finite number for every response"
        )
    return scores, applies


def warn_of_dropped_tokens(reward: Reward, samples: Samples) -> None:
    """Log a warning, once a reward, if the text that it scores lacks tokens that were sampled."""
    if samples.dropped_tokens and reward.skips_special_tokens and not reward._warned_of_dropped_tokens:
        reward._warned_of_dropped_tokens = True
        log.warning(
            "%s scores text without special tokens, but responses have %s in them, which it does not see; a FunctionReward or "
            "FormatReward with skip_special_tokens: false does",
            reward.name,
            ", ".join(harmless(repr(token)) for token in samples.dropped_tokens[:5]),
        )


def checked_scores(reward: Reward, samples: Samples) -> Tensor:
    """A score for every sample, from a reward that has to apply to all of them.

    Raises:
        UserError: As :func:`applicable_scores`; or if the reward does not apply to a sample.
    """
    scores, applies = applicable_scores(reward, samples)
    if not applies.all():
        first = int((~applies).nonzero()[0])
        raise UserError(
            f"{reward.name} does not apply to {int((~applies).sum())} of {len(scores)} samples, first to the response "
            f"{samples.completions[first][:80]!r}; leave such rows out, or add a reward that applies, in WeightedRewards"
        )
    return scores
