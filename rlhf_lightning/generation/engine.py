"""What a generation engine is given and what it gives back."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.errors import UserError


@dataclass(frozen=True)
class SamplingParameters:
    """How responses are drawn.

    Attributes:
        max_new_tokens: Longest response, EOS included.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Smallest set of tokens with at least this probability; 1 keeps all.
        top_k: The k most likely tokens; 0 keeps all.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        """Refuse parameters that no distribution has."""
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise UserError(f"sampling parameters out of range: {self}")

    @property
    def samples_the_policy(self) -> bool:
        """Whether responses come from the very distribution whose log-probabilities are trained on."""
        return self.temperature > 0 and self.top_p == 1 and self.top_k == 0


class GenerationEngine(ABC):
    """Draws responses from a causal language model."""

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
    ) -> Tensor:
        """Draw one response a prompt.

        Args:
            network: The model.
            input_ids: Left-padded prompts. Shape (batch, prompt_length), int64.
            attention_mask: True on real tokens. Same shape, bool.
            sampling: How to draw.
            eos_ids: Ids that end a response.
            pad_id: What fills a response after its end.

        Returns:
            Shape (batch, longest response), int64: tokens up to and including the first EOS, then ``pad_id``.
        """
