"""How gradients are written down and how far two results are apart."""

from typing import Any

import torch
from torch import Tensor, nn


def fingerprint(gradient: Tensor) -> list[float]:
    """Norm of a gradient, its projections on two fixed directions, and three of its entries."""
    flat = gradient.detach().double().flatten()
    index = torch.arange(1, flat.numel() + 1, dtype=torch.float64)
    projections = [float((flat * torch.sin(step * index)).sum()) for step in (1.0, 2.7)]
    entries = [float(flat[i]) for i in (0, flat.numel() // 2, flat.numel() - 1)]
    return [float(flat.norm()), *projections, *entries]


def distance(theirs: dict[str, list[float]], ours: dict[str, list[float]]) -> float:
    """Largest difference of two networks' gradients, each parameter's relative to its norm.

    A gradient that is nothing but rounding (GPT-2's key biases have none) counts relative to a thousandth of the whole.
    """
    assert theirs.keys() == ours.keys()
    whole = sum(numbers[0] ** 2 for numbers in theirs.values()) ** 0.5
    return max(apart(theirs[name], ours[name]) / max(theirs[name][0], 1e-3 * whole) for name in theirs)


def apart(theirs: Any, ours: Any) -> float:
    """Largest absolute difference of two arrays of one shape."""
    one, other = torch.as_tensor(theirs, dtype=torch.float64), torch.as_tensor(ours, dtype=torch.float64)
    assert one.shape == other.shape
    return float((one - other).abs().max())


def gradients(model: nn.Module) -> dict[str, list[float]]:
    """Fingerprints by the name that the parameter has in its Hugging Face folder."""
    return {name: fingerprint(p.grad) for name, p in model.named_parameters() if p.grad is not None}
