"""Sampling by hand: one prefill over the flat prompts, a static KV cache, finished rows taken out, inverse-CDF draws."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bare_llama import BareLlama, Flat, half_swapped
from benchmarks.forced import script_of


class Cache:
    """Keys and values of the rows that are still drawn, prompts aligned at their ends.

    One tensor of shape (layers, 2, rows, kv heads, columns, size); ``begins`` holds each row's first column.
    """

    def __init__(self, model: BareLlama, flat: Flat, kept: list[tuple[Tensor, Tensor]], new_tokens: int) -> None:
        rows, width = len(flat.lengths), max(flat.lengths)
        shape = (model.layers, 2, rows, model.kv_heads, width + new_tokens, model.size)
        self.store = torch.zeros(shape, dtype=model.dtype)
        self.begins = width - torch.tensor(flat.lengths)
        self.width = width
        for layer, both in enumerate(kept):
            for which, x in enumerate(both):
                for row, part in enumerate(x.split(flat.lengths)):
                    self.store[layer, which, row, :, width - len(part) : width] = part.transpose(0, 1)

    def drop(self, finished: list[int], rows: int) -> int:
        """Put the last rows in the places of finished ones; returns how many rows are left."""
        for place in sorted(finished, reverse=True):
            rows -= 1
            if place != rows:
                self.store[:, :, place, :, : self.width] = self.store[:, :, rows, :, : self.width]
                self.begins[place] = self.begins[rows]
        return rows


@torch.no_grad()
def generate(model: BareLlama, rows: list[dict[str, list[int]]], new_tokens: int) -> tuple[list[list[int]], Tensor]:
    """Draw a response to each prompt, of the forced tokens.

    Returns:
        The responses, and the log-probabilities of their tokens, flat.
    """
    script = script_of(rows)
    lengths = torch.tensor([len(row["chosen_ids"]) for row in rows])
    # Cast once: the weights stay what they are until the update.
    weights = {name: w.detach().to(model.dtype) for name, w in model.weights.items()}
    flat = Flat.of([(row["prompt_ids"], []) for row in rows])
    kept: list[tuple[Tensor, Tensor]] = []
    ends = torch.tensor(flat.lengths).cumsum(0) - 1
    hidden = model.hidden(flat, kept)[ends]
    cache, active = Cache(model, flat, kept, new_tokens), torch.arange(len(rows))
    logprobs = torch.zeros(script.shape)
    for step in range(script.shape[1]):
        tokens = script[active, step]
        logprobs[active, step] = draw(F.linear(hidden.to(model.dtype), weights["embed"]).float(), tokens)
        finished = (lengths[active] == step + 1).nonzero().flatten().tolist()
        left = cache.drop(finished, len(active))
        if left == 0:
            break
        if finished:
            for place in sorted(finished, reverse=True):
                active[place], tokens[place] = active[-1], tokens[-1]
                active, tokens = active[:-1], tokens[:-1]
        hidden = decode(model, weights, cache, tokens)
    return [row["chosen_ids"] for row in rows], torch.cat([x[:n] for x, n in zip(logprobs, lengths, strict=True)])


def draw(logits: Tensor, forced: Tensor) -> Tensor:
    """A draw by inverse CDF, which is then replaced by the forced token; log-probability of that."""
    chosen = logits.gather(1, forced[:, None]).squeeze(1)
    peak = logits.amax(1, keepdim=True)
    mass = logits.sub_(peak).exp_().cumsum(1)
    total = mass[:, -1:]
    torch.searchsorted(mass, torch.rand(len(mass), 1) * total)
    return chosen - peak.squeeze(1) - total.squeeze(1).log()


def decode(model: BareLlama, weights: dict[str, Tensor], cache: Cache, tokens: Tensor) -> Tensor:
    """Hidden states after one more token a row. Shape (rows, hidden)."""
    rows, column, group = len(tokens), cache.width, model.heads // model.kv_heads
    cache.width = column + 1
    begins = cache.begins[:rows]
    cos, sin = model.cos[column - begins, None], model.sin[column - begins, None]
    seen = torch.arange(column + 1) >= begins[:, None]
    mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill_(~seen, -torch.inf)[:, None, None]
    x = F.embedding(tokens, model.weights["embed"])
    for layer in range(model.layers):
        qkv = F.linear(norm(x, model, f"{layer}.norm1"), weights[f"{layer}.qkv"]).view(rows, -1, model.size)
        qk, v = qkv.split([model.heads + model.kv_heads, model.kv_heads], dim=1)
        q, k = (qk * cos).addcmul_(half_swapped(qk), sin).split([model.heads, model.kv_heads], dim=1)
        keys, values = cache.store[layer, :, :rows].unbind(0)
        keys[:, :, column], values[:, :, column] = k, v
        # The queries of one group stand in a column of their own: keys and values are read once for all of them.
        q = q.reshape(rows, model.kv_heads, group, model.size)
        mixed = F.scaled_dot_product_attention(q, keys[:, :, : column + 1], values[:, :, : column + 1], mask)
        x = x + F.linear(mixed.reshape(rows, -1), weights[f"{layer}.o"])
        gate, up = F.linear(norm(x, model, f"{layer}.norm2"), weights[f"{layer}.gate_up"]).chunk(2, -1)
        x = x + F.linear(F.silu(gate).mul_(up), weights[f"{layer}.down"])
    return norm(x, model, "norm").float()


def norm(x: Tensor, model: BareLlama, name: str) -> Tensor:
    """RMS norm in float32, given on in the dtype of the matrix products."""
    return F.rms_norm(x, x.shape[-1:], model.weights[name], model.eps).to(model.dtype)
