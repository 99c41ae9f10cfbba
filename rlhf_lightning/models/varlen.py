"""Attention over packed sequences of different lengths in one flash-attention kernel, on devices that have one."""

import inspect
import logging
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

log = logging.getLogger(__name__)

DEVICES = ("cuda",)
DTYPES = (torch.float16, torch.bfloat16)
MULTIPLE = 8  # the kernel wants head sizes that are multiples of this


def has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether :func:`varlen_attention` runs on this device, in this precision and with these head sizes.

    Args:
        query: Shape (tokens, heads, head size).
        value: Shape (tokens, key heads, value head size).
    """
    if query.device.type not in DEVICES or query.dtype not in DTYPES:
        return False
    return _runs(query.device, query.dtype, max(query.shape[-1], value.shape[-1]))


@cache
def _runs(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Call the kernel once on two tokens. A wrong call (a TypeError) is raised, never taken for a missing kernel."""
    tokens = torch.zeros(2, 1, head_size, dtype=dtype, device=device)
    try:
        with torch.no_grad():
            varlen_attention(tokens, tokens, tokens, [2], [2], None, None)
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        log.warning(
            "the kernel for packed sequences does not run on %s in %s with heads of %d (%s): sequences of equal length are "
            "computed together instead",
            device,
            str(dtype).removeprefix("torch."),
            head_size,
            str(error).splitlines()[0] if str(error) else type(error).__name__,
        )
        return False
    return True


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: list[int],
    keys: list[int],
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Causal attention within each sequence; with more keys than queries, the queries are the last tokens.

    Args:
        query: Shape (tokens, heads, head size).
        key: Shape (key tokens, key heads, head size).
        value: Shape (key tokens, key heads, value head size).
        queries: Query tokens of each sequence.
        keys: Key tokens of each sequence.
        scaling: Of the scores; None for 1 / sqrt(head size).
        window: A token sees this many tokens, itself included; None for all before it.

    Returns:
        Shape (tokens, heads, value head size).
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    size, value_size = max(query.shape[-1], value.shape[-1]), value.shape[-1]
    size += -size % MULTIPLE
    # Zeros change no score and add zeros to the output: the kernel knows one size for keys and values.
    query, key, value = (F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x for x in (query, key, value))
    from_query, from_key = (
        torch.tensor([0, *x]).cumsum(0).to(query.device, torch.int32, non_blocking=True) for x in (queries, keys)
    )
    known = _parameters(varlen_attn)
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1 if window is None else window - 1, 0)}
    if "enable_gqa" in known:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    elif query.shape[1] != key.shape[1]:  # before torch 2.12
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    out = varlen_attn(query, key, value, from_query, from_key, max(queries), max(keys), **options)
    assert isinstance(out, Tensor)
    return out[..., :value_size]


@cache
def _parameters(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
