"""What a generation engine is given and what it gives back."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.errors import UserError


@dataclass(frozen=True)
class SamplingParameters:
    """How responses are sampled.

    The meaning of each parameter is that of the field of the same name in transformers' ``GenerationConfig``, in every
    engine. They are applied in this order: repetition penalty, minimum length, temperature, top-k, top-p, min-p. Nothing is
    taken from the ``generation_config.json`` of the model except its EOS tokens.

    Attributes:
        max_new_tokens: Longest response, EOS included.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Smallest set of tokens with at least this probability; 1 keeps all.
        top_k: The k most likely tokens; 0 keeps all.
        engine: Generates the responses; None for :class:`~rlhf_lightning.generation.native.NativeEngine`.
        min_p: Drops tokens whose probability is below this share of the most likely token's; 0 keeps all.
        repetition_penalty: Divides the positive logits and multiplies the negative logits of tokens that are in the prompt or
            in the response so far; 1 changes nothing.
        min_new_tokens: EOS is impossible before the response has this many tokens. A stop string ends it all the same.
        stop_strings: Texts that end a response, one or a list. The response ends with the token that completes the first of
            them: it is finished, not truncated, and the stop string is part of its tokens, of its loss mask, and of the text
            that a reward scores. No EOS is added, so that an online method does not learn to emit one there; SFT on rows of
            ``sample`` does. Only the text of the response counts, not that of the prompt.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    engine: "GenerationEngine | None" = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    stop_strings: list[str] | str = field(default_factory=list)

    def __post_init__(self) -> None:
        # A tuple, because parameters that cannot be changed must stay hashable.
        strings = (self.stop_strings,) if isinstance(self.stop_strings, str) else tuple(self.stop_strings)
        object.__setattr__(self, "stop_strings", strings)
        limits = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, "from 0 to max_new_tokens"),
            "stop_strings": (all(strings), "texts that are not empty"),
        }
        for name, (fits, wanted) in limits.items():
            if not fits:
                raise UserError(f"sampling: {name} must be {wanted}, not {getattr(self, name)!r}")

    @property
    def departures(self) -> list[str]:
        """Settings that sample from another distribution than the one whose log-probabilities are trained on.

        A stop string is not among them: it ends the response early, and each token up to there is drawn as before.
        """
        settings = {
            "temperature": (self.temperature == 0, "is greedy"),
            "top_p": (self.top_p != 1, "drops unlikely tokens"),
            "top_k": (self.top_k != 0, "drops unlikely tokens"),
            "min_p": (self.min_p != 0, "drops unlikely tokens"),
            "repetition_penalty": (self.repetition_penalty != 1, "changes the logits of repeated tokens"),
            "min_new_tokens": (self.min_new_tokens != 0, "makes EOS impossible"),
        }
        return [f"{name} {getattr(self, name)} {why}" for name, (departs, why) in settings.items() if departs]

    @property
    def samples_the_policy(self) -> bool:
        """Whether responses come from the very distribution whose log-probabilities are trained on."""
        return not self.departures


class Generation(NamedTuple):
    """Sampled responses, and what the engine saw when it drew them.

    Attributes:
        tokens: Up to and including the first EOS, then the pad id. Shape (batch, longest response), int64.
        logprobs: Of each token under the distribution that it was drawn from, zero after the end; None where the engine
            keeps none. Same shape, float32, nats.
        entropy: Of those distributions, zero after the end; None where the engine keeps none. Same shape, nats.
    """

    tokens: Tensor
    logprobs: Tensor | None = None
    entropy: Tensor | None = None


class GenerationEngine(ABC):
    """Draws responses from a causal language model.

    Attributes:
        same_numbers: The engine computes with the policy's own weights in the policy's own precision, so that its
            log-probabilities can stand for the policy's. Where False, the policy scores the responses again, and the
            mismatch is corrected for.
    """

    same_numbers: ClassVar[bool] = True

    def expect(self, sampling: SamplingParameters) -> None:  # noqa: B027  (most engines need nothing for it)
        """Prepare for these parameters; called before the first batch, by ``engine_for``."""

    def take_weights(  # noqa: B027  (most engines compute with the network itself)
        self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, version: int
    ) -> None:
        """Draw from these weights from now on; called before each batch of responses, by every rank.

        Args:
            network: The policy, whole (not in shards).
            tokenizer: Its tokenizer.
            version: Changes whenever the weights have changed: an engine with weights of its own need not ask for them twice.
        """

    def rest(self) -> None:  # noqa: B027  (most engines keep nothing)
        """The responses of this iteration are drawn: what the engine does not need until the next may go."""

    @abstractmethod
    def generate(
        self,
        network: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        sampling: SamplingParameters,
        *,
        eos_ids: list[int],
        pad_id: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Generation:
        """Draw one response a prompt.

        Args:
            network: The model.
            input_ids: Left-padded prompts. Shape (batch, prompt_length), int64.
            attention_mask: True on real tokens. Same shape, bool.
            sampling: How to draw.
            eos_ids: Ids that end a response.
            pad_id: What fills a response after its end.
            tokenizer: Needed for ``sampling.stop_strings``, and given only with them. An engine that cannot stop there may
                generate on: the caller cuts each response after its stop string.
        """
