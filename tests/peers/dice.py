"""Loaded dice: ``generate`` runs as it is, its logits are its own, and what it draws is what the script says."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor


@contextmanager
def loaded_dice(responses: list[list[int]]) -> Iterator[None]:
    """Make every draw inside ``generate`` the next column of these responses.

    Args:
        responses: Token ids, a row a prompt, in the order in which the prompts are given.
    """
    columns = iter(torch.tensor(responses).T)

    def multinomial(probabilities: Tensor, num_samples: int, **kwargs: Any) -> Tensor:
        drawn = next(columns)[:, None]
        assert probabilities.shape[0] == len(drawn)
        assert num_samples == 1
        return drawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", multinomial)
        yield
