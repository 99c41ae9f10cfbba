"""Casting networks to half precision without damage to what has to stay float32."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


def at_least_float32(x: Tensor) -> Tensor:
    """Cast half precision to float32; leave float32 and float64 as they are. Any shape."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Float32Buffers(nn.Module):
    """A module whose float32 buffers, and those of everything in it, stay float32 when its weights are cast to half precision.

    Rotary frequencies are such buffers: in bfloat16 they are off by .4 rad at position 1000, and no checkpoint holds them to
    correct it. So are the gain, bias and temperature of a reward model.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = float32_buffers(self)
        result = super()._apply(fn, recurse)
        restore(before)
        return result


def cast(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of a network, in place; to half precision without its float32 buffers."""
    before = float32_buffers(network)
    network.to(dtype)
    restore(before)


def float32_buffers(network: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Every float32 buffer with the module that holds it and its name there."""
    return [
        (module, name, buffer)
        for module in network.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.dtype == torch.float32
    ]


def restore(buffers: list[tuple[nn.Module, str, Tensor]]) -> None:
    """Put the values back into those that have become half precision, on the device where these are now."""
    for module, name, buffer in buffers:
        now = module._buffers[name]
        if now is not None and now.dtype in HALF:
            module._buffers[name] = buffer.to(now.device)


def weight_dtypes(network: nn.Module) -> set[torch.dtype]:
    """Dtypes of the weights, packed (quantized) ones aside."""
    return {parameter.dtype for parameter in network.parameters() if parameter.is_floating_point()}
