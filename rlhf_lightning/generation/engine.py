"""What a generation engine is given and what it gives back."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.errors import UserError


@dataclass(frozen=True)
class SamplingParameters:
    """How responses are drawn.

    Attributes:
        max_new_tokens: Longest response, EOS included.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Smallest set of tokens with at least this probability; 1 keeps all.
        top_k: The k most likely tokens; 0 keeps all.
        engine: What draws them; None for :class:`~rlhf_lightning.generation.native.NativeEngine`.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    engine: "GenerationEngine | None" = None

    def __post_init__(self) -> None:
        """Refuse parameters that no distribution has."""
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise UserError(f"sampling parameters out of range: {self}")

    @property
    def samples_the_policy(self) -> bool:
        """Whether responses come from the very distribution whose log-probabilities are trained on."""
        return self.temperature > 0 and self.top_p == 1 and self.top_k == 0


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
    ) -> Generation:
        """Draw one response a prompt.

        Args:
            network: The model.
            input_ids: Left-padded prompts. Shape (batch, prompt_length), int64.
            attention_mask: True on real tokens. Same shape, bool.
            sampling: How to draw.
            eos_ids: Ids that end a response.
            pad_id: What fills a response after its end.
        """
