"""A network that is only looked at."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Frozen:
    """Holds a network outside the module tree: not trained, not wrapped by DDP, not written into checkpoints.

    Calls run without gradient. The weights stay bit for bit what they were.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    def to(self, device: torch.device | str) -> "Frozen":
        """Move the network."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's forward."""
        forward: Callable[..., Any] = self.network
        return forward(*args, **kwargs)
