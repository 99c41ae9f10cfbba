"""Texts that end a response."""

from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import SamplingParameters

MARGIN = 8  # tokens that may have no text of their own, such as the first bytes of a character


class StopStrings:
    """Finds the token that completes a stop string.

    Text is compared, not tokens: a stop string may begin and end inside a token, and its characters may be spread over
    several. Special tokens count by their text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> None:
        """Args: the tokenizer of the responses, and the texts, none of them empty."""
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        # Some decoders drop the space before the first token of a text, which a response that continues a prompt has.
        self.before = tokenizer("a", add_special_tokens=False)["input_ids"]
        self.prefix = self._decoded([[]])[0]
        # A token has at least one byte of text, so that no stop string is longer than this.
        self.window = max(len(string.encode()) for string in self.strings) + MARGIN

    def completed(self, tokens: Tensor) -> Tensor:
        """Whether each response has a stop string, given that the response without its last token had none.

        Args:
            tokens: Responses so far. Shape (rows, length), int64.

        Returns:
            Shape (rows,), bool.
        """
        found = [self._has_stop(text) for text in self._texts(tokens[:, -self.window :].tolist())]
        for row in (row for row, likely in enumerate(found) if likely):  # `end` decides by the complete response
            found[row] = self._has_stop(self._texts([tokens[row].tolist()])[0])
        return torch.tensor(found, device=tokens.device)

    def end(self, tokens: list[int]) -> int | None:
        """Number of tokens up to and including the one that completes the first stop string; None where there is none."""
        if not self._has_stop(self._texts([tokens])[0]):
            return None
        return bisect_left(range(len(tokens)), True, key=lambda n: self._has_stop(self._texts([tokens[:n]])[0]))

    def _has_stop(self, text: str) -> bool:
        return any(string in text for string in self.strings)

    def _texts(self, rows: list[list[int]]) -> list[str]:
        return [text.removeprefix(self.prefix) for text in self._decoded(rows)]

    def _decoded(self, rows: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(
            [[*self.before, *row] for row in rows], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def stop_strings_of(sampling: SamplingParameters, tokenizer: PreTrainedTokenizerBase | None) -> StopStrings | None:
    """The finder for ``sampling.stop_strings``; None where there are none.

    Raises:
        UserError: If there are some and no tokenizer was given.
    """
    if not sampling.stop_strings:
        return None
    if tokenizer is None:
        raise UserError("sampling.stop_strings are compared with text: give generate() the tokenizer too")
    return StopStrings(tokenizer, sampling.stop_strings)
