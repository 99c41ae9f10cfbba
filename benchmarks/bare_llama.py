"""A Llama by hand, over the weights of a Hugging Face folder: what a training step costs where nothing is in the way.

Rows are laid end to end; matrix products meet no padding; attention runs row by row through the causal flash kernel.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.autograd import Function

aten = torch.ops.aten


@dataclass
class Flat:
    """Rows laid end to end.

    Attributes:
        ids: Shape (tokens,), int64.
        lengths: Tokens of each row.
        scored: Positions whose next token is a response token. Shape (responses' tokens,), int64.
    """

    ids: Tensor
    lengths: list[int]
    scored: Tensor

    @classmethod
    def of(cls, pairs: list[tuple[list[int], list[int]]]) -> "Flat":
        """From prompts with their responses."""
        ids = [token for prompt, response in pairs for token in (*prompt, *response)]
        scored: list[int] = []
        start = 0
        for prompt, response in pairs:
            begin = start + len(prompt) - 1
            scored += range(begin, begin + len(response))
            start += len(prompt) + len(response)
        return cls(torch.tensor(ids), [len(p) + len(r) for p, r in pairs], torch.tensor(scored))

    @property
    def targets(self) -> Tensor:
        """The response tokens."""
        return self.ids[self.scored + 1]


class BareLlama:
    """Weights with queries, keys and values in one matrix, gate and up in another; ``score`` only of a scalar model."""

    def __init__(self, folder: str, dtype: torch.dtype = torch.float32, trained: bool = True) -> None:
        """Load a folder; ``dtype`` is that of the matrix products, weights stay float32."""
        config = json.loads(Path(folder, "config.json").read_text())
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.size, self.layers = config["hidden_size"] // self.heads, config["num_hidden_layers"]
        self.eps, self.dtype = config["rms_norm_eps"], dtype
        weights = load_file(Path(folder, "model.safetensors"))
        self.weights = {name: w.requires_grad_(trained) for name, w in fused(weights, self.layers).items()}
        theta = config["rope_parameters"]["rope_theta"]
        rates = theta ** -(torch.arange(0, self.size, 2) / self.size)
        angles = torch.arange(config["max_position_embeddings"])[:, None] * torch.cat([rates, rates])
        sign = torch.cat([-torch.ones(self.size // 2), torch.ones(self.size // 2)])
        self.cos, self.sin = angles.cos().to(dtype), (angles.sin() * sign).to(dtype)

    def parameters(self) -> list[Tensor]:
        return list(self.weights.values())

    @property
    def head(self) -> Tensor:
        """Shape (vocabulary, hidden): tied to the embedding."""
        return self.weights["embed"]

    def hidden(self, flat: Flat, keep: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """Last hidden states of all tokens, (tokens, hidden), float32; keys and values of each layer go into ``keep``."""
        positions = torch.cat([torch.arange(n) for n in flat.lengths])
        cos, sin = self.cos[positions, None], self.sin[positions, None]
        x = F.embedding(flat.ids, self.weights["embed"])
        for layer in range(self.layers):
            x = self._layer(x, layer, cos, sin, flat.lengths, keep)
        return Norm.apply(x, self.weights["norm"], self.eps)

    def _layer(self, x: Tensor, layer: int, cos: Tensor, sin: Tensor, lengths: list[int], keep: Any) -> Tensor:
        qkv = self.linear(Norm.apply(x, self.weights[f"{layer}.norm1"], self.eps), f"{layer}.qkv")
        qkv = qkv.view(len(x), self.heads + 2 * self.kv_heads, self.size)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        q, k = Rotated.apply(qk, cos, sin).split([self.heads, self.kv_heads], dim=1)
        if keep is not None:
            keep.append((k, v))
        group = self.heads // self.kv_heads
        mixed = Attention.apply(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), lengths)
        x = x + self.linear(mixed.view(len(x), -1), f"{layer}.o")
        gate, up = self.linear(Norm.apply(x, self.weights[f"{layer}.norm2"], self.eps), f"{layer}.gate_up").chunk(2, -1)
        return x + self.linear(F.silu(gate) * up, f"{layer}.down")

    def linear(self, x: Tensor, name: str) -> Tensor:
        """A matrix product in the dtype of the run."""
        return F.linear(x.to(self.dtype), self.weights[name].to(self.dtype))

    def logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Of the targets, each predicted from its hidden state. Shape (targets,), float32."""
        logprobs: Tensor = TokenLogprobs.apply(hidden.to(self.dtype), self.head.to(self.dtype), targets)
        return logprobs

    def values(self, hidden: Tensor) -> Tensor:
        """The scalar head, in float32."""
        return F.linear(hidden, self.weights["score"]).squeeze(-1)


def fused(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The names and matrices of :class:`BareLlama` from those of Hugging Face."""
    own = {"embed": weights["model.embed_tokens.weight"].clone(), "norm": weights["model.norm.weight"].clone()}
    for layer in range(layers):
        of = {name: weights[f"model.layers.{layer}.{name}.weight"] for name in LAYER}
        own[f"{layer}.norm1"] = of["input_layernorm"].clone()
        own[f"{layer}.norm2"] = of["post_attention_layernorm"].clone()
        own[f"{layer}.qkv"] = torch.cat([of[f"self_attn.{name}_proj"] for name in "qkv"])
        own[f"{layer}.o"] = of["self_attn.o_proj"].clone()
        own[f"{layer}.gate_up"] = torch.cat([of["mlp.gate_proj"], of["mlp.up_proj"]])
        own[f"{layer}.down"] = of["mlp.down_proj"].clone()
    if "score.weight" in weights:
        own["score"] = weights["score.weight"].clone()
    return own


LAYER = (
    "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


# ---------------------------------------------------------------- operations whose backward pass is written by hand


class Norm(Function):
    """RMS norm in float32; saves the input and one number a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed, weighted = x * scale, grad * weight
        along = torch.linalg.vecdot(weighted, normed).div_(x.shape[-1])[:, None]
        return weighted.addcmul_(normed, along, value=-1).mul_(scale), torch.linalg.vecdot(grad, normed, dim=0), None


def half_swapped(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([second, first], -1)


class Rotated(Function):
    """Rotary positions: x cos + swap(x) sin, whose transpose is x cos + swap(x sin)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return (x * cos).addcmul_(half_swapped(x), sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return (grad * cos).add_(half_swapped(grad * sin)), None, None


class Attention(Function):
    """Causal attention within each row of a flat batch; q, k, v of shape (tokens, heads, size)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
        parts = []
        for row in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
            given = [x.transpose(0, 1)[None] for x in row]
            parts.append(aten._scaled_dot_product_flash_attention_for_cpu(*given, 0.0, True))
        ctx.lengths, ctx.sums = lengths, [lse for _, lse in parts]
        out = torch.cat([out[0].transpose(0, 1) for out, _ in parts])
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out = ctx.saved_tensors
        split = zip(*(x.split(ctx.lengths) for x in (grad, q, k, v, out)), strict=True)
        grads = []
        for row, lse in zip(split, ctx.sums, strict=True):
            given = [x.transpose(0, 1)[None] for x in row]
            grads.append(aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, lse, 0.0, True))
        dq, dk, dv = (torch.cat([g[i][0].transpose(0, 1) for g in grads]) for i in range(3))
        return dq, dk, dv, None


class TokenLogprobs(Function):
    """Log-softmax at the targets; logits are kept for the backward pass, which turns them into their gradient in place."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        everything = torch.log_softmax(hidden @ weight.T, -1, dtype=torch.float32)
        ctx.everything = everything
        ctx.save_for_backward(hidden, weight, targets)
        return everything.gather(1, targets[:, None]).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, targets = ctx.saved_tensors
        grads = ctx.everything.exp_().mul_(-grad[:, None])
        grads[torch.arange(len(targets)), targets] += grad
        grads = grads.to(hidden.dtype)
        return grads @ weight, grads.T @ hidden, None


class CrossEntropy(Function):
    """Mean cross-entropy with the gradient made in the forward pass, a few hundred rows of logits at a time."""

    CHUNK = 512

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        loss, hidden_grad = torch.zeros(()), torch.empty_like(hidden)
        weight_grad = torch.zeros(weight.shape)
        for start in range(0, len(targets), CrossEntropy.CHUNK):
            part = slice(start, start + CrossEntropy.CHUNK)
            p = torch.softmax(hidden[part] @ weight.T, -1, dtype=torch.float32)
            at = torch.arange(len(p)), targets[part]
            loss -= p[at].log().sum()
            p[at] -= 1
            p = p.div_(len(targets)).to(hidden.dtype)
            hidden_grad[part] = p @ weight
            if weight.dtype == torch.float32:
                weight_grad.addmm_(p.T, hidden[part])
            else:
                weight_grad += p.T @ hidden[part]
        ctx.grads = hidden_grad, weight_grad.to(weight.dtype)
        return loss / len(targets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_grad, weight_grad = ctx.grads
        return hidden_grad.mul_(grad), weight_grad.mul_(grad), None
