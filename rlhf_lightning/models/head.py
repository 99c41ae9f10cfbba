"""The language-model head over a list of positions, a chunk at a time: no tensor of all positions by the vocabulary."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from transformers import PreTrainedModel

from rlhf_lightning.functional.token_scores import TokenScores, logit_gradient, token_scores

# Positions at a time. With fewer, the gradient of the head's weights is added up too often; with more, logits leave the
# caches of a CPU.
ROWS = {"cpu": 256, "cuda": 4096}
# Logits made at a time, at most.
CHUNK = {"cpu": 2**25, "cuda": 2**27}
# Log-probabilities kept until the backward; those of further chunks are computed again.
KEPT = {"cpu": 2**26, "cuda": 2**27}


MISSING = "missing_token_ids"  # a buffer of the network


def mask_missing_tokens(network: PreTrainedModel, ids: set[int]) -> None:
    """Give probability zero to ids that no token has: a policy is a distribution over the tokens that exist.

    Many models have more rows than tokens (Qwen2.5: 151,936 and 151,665), and some vocabularies have holes. What is sampled
    and what is trained on must be one distribution, so the mask is in the logits of both, and in the reference's. The rows
    without a token then get no gradient, and an export has them as they were.

    Args:
        network: As loaded.
        ids: Of all tokens.
    """
    embedding: Any = network.get_input_embeddings()
    missing = [index for index in range(embedding.weight.shape[0]) if index not in ids]
    if missing:
        network.register_buffer(MISSING, torch.tensor(missing), persistent=False)


def missing_tokens(network: PreTrainedModel) -> Tensor | None:
    """Ids that no token has, shape (n,), int64; None where each has one."""
    return getattr(network, MISSING, None)


def head_logits(network: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits from hidden states, minus infinity where no token has the id.

    Args:
        network: A causal language model.
        hidden: Shape (..., hidden).

    Returns:
        Shape (..., vocabulary), in the model's dtype.
    """
    logits, missing = raw_logits(network, hidden), missing_tokens(network)
    return logits if missing is None else logits.index_fill(-1, missing, -torch.inf)


def raw_logits(network: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits of every row of the head, with the extra step that some architectures take after it; as :func:`head_logits`."""
    logits = network.get_output_embeddings()(hidden)
    config = network.config.get_text_config()
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
        logits = torch.tanh(logits / cap) * cap
    return logits


def head_scores(
    network: PreTrainedModel,
    hidden: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
    equal_weights: bool = False,
    collisions: bool = False,
) -> TokenScores:
    """Log-probability and entropy of one token a position.

    Args:
        network: A causal language model.
        hidden: Last hidden states of the positions *before* the tokens. Shape (n, hidden).
        tokens: Shape (n,), int64.
        temperature: Divides the logits, > 0.
        entropy_gradient: Let gradients flow through the entropy (for an entropy bonus).
        equal_weights: The loss will weigh every log-probability alike, as the likelihood does. The gradients are then made
            with the logits at hand; otherwise those beyond what may be kept are computed again for them.
        collisions: Whether to compute them too; they carry no gradient.

    Raises:
        RuntimeError: In the backward pass, if weights that were said to be equal are not.
    """
    weights = [p for p in network.get_output_embeddings().parameters() if p.requires_grad]
    device, vocabulary = "cuda" if hidden.is_cuda else "cpu", network.config.get_text_config().vocab_size
    rows, kept = max(min(ROWS[device], CHUNK[device] // vocabulary), 1), KEPT[device] // vocabulary
    trains = torch.is_grad_enabled() and (hidden.requires_grad or bool(weights))
    job = _Job(
        lambda h: raw_logits(network, h),
        missing_tokens(network),
        tokens,
        rows,
        kept // rows,
        temperature,
        trains,
        entropy_gradient,
        equal_weights,
        collisions,
    )
    return TokenScores(*_HeadScores.apply(job, hidden, *weights))


class _Job(NamedTuple):
    logits: Callable[[Tensor], Tensor]
    missing: Tensor | None
    tokens: Tensor
    rows: int
    kept: int
    temperature: float
    trains: bool
    entropy_gradient: bool
    equal_weights: bool
    collisions: bool


class _HeadScores(torch.autograd.Function):
    """Scores in the forward; in the backward the gradient, from logits that were kept or are computed again."""

    @staticmethod
    def forward(ctx: Any, job: _Job, hidden: Tensor, *weights: Tensor) -> tuple[Tensor | None, ...]:
        ctx.job, ctx.kept, ctx.made = job, [], None
        chunks = list(zip(hidden.split(job.rows), job.tokens.split(job.rows), strict=True))
        sums = _Sums(hidden, weights) if job.trains and job.equal_weights else None
        scores = []
        for h, y in chunks:
            made, log_probs, scored = _made(job, h, y)
            scores.append(scored)
            if sums is not None:
                gradient = logit_gradient(
                    log_probs, y, torch.ones_like(scored.logprobs), scored.entropy, None, temperature=job.temperature
                )
                sums.add(made, gradient)
            elif job.trains and len(ctx.kept) < job.kept:
                ctx.kept.append((made, log_probs))
        columns: list[Any] = list(zip(*scores, strict=True))
        joined: list[Any] = [None if parts[0] is None else torch.cat(parts) for parts in columns]
        whole = TokenScores(*joined)
        ctx.made = sums.result() if sums is not None else None
        ctx.autocast = torch.is_autocast_enabled(hidden.device.type), torch.get_autocast_dtype(hidden.device.type)
        if ctx.made is None:
            ctx.save_for_backward(hidden, whole.entropy, *weights)
        asked = (None if job.entropy_gradient else whole.entropy, whole.collisions)
        ctx.mark_non_differentiable(whole.greedy, whole.mean_logit, *(x for x in asked if x is not None))
        return tuple(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        job = ctx.job
        if ctx.made is not None:
            scale = grads[0][:1]
            alike = torch.isclose(grads[0], scale, rtol=0, atol=0, equal_nan=True)  # of NaN, the guard of steps tells
            if not alike.all():
                raise RuntimeError("the log-probabilities were said to weigh alike in the loss, and do not")
            return (None, *(made * scale.sum().to(made.dtype) for made in ctx.made))
        hidden, entropy, *weights = ctx.saved_tensors
        sums, enabled = _Sums(hidden, weights), ctx.autocast
        kept, ctx.kept = ctx.kept, []  # good for once: their graphs are freed and their memory written over
        entropy_grads = grads[1].split(job.rows) if job.entropy_gradient else None
        parts = (x.split(job.rows) for x in (hidden, job.tokens, grads[0], entropy))
        for number, (h, y, grad, known) in enumerate(zip(*parts, strict=True)):
            with torch.autocast(hidden.device.type, enabled=enabled[0], dtype=enabled[1]):
                made, log_probs = kept.pop(0) if kept else _made(job, h, y)[:2]
            entropy_grad = None if entropy_grads is None else entropy_grads[number]
            sums.add(made, logit_gradient(log_probs, y, grad, known, entropy_grad, temperature=job.temperature))
        return (None, *sums.result())


class _Made(NamedTuple):
    """Where logits came from, without the logits: what a linear head needs for its gradients are its inputs."""

    leaf: Tensor
    edge: Any  # a GradientEdge; None where nothing is trained
    dtype: torch.dtype


def _made(job: _Job, hidden: Tensor, tokens: Tensor) -> tuple[_Made, Tensor, TokenScores]:
    """Scores, and a graph of their own, so that a head of any make (with an adapter, say) gives its own gradient."""
    leaf = hidden.detach().requires_grad_(job.trains)
    with torch.set_grad_enabled(job.trains):
        logits = job.logits(leaf)
    scored, log_probs = token_scores(
        logits.detach(), tokens, temperature=job.temperature, collisions=job.collisions, missing=job.missing
    )
    return _Made(leaf, get_gradient_edge(logits) if job.trains else None, logits.dtype), log_probs, scored


class _Sums:
    """Gradients of the positions side by side, those of the weights added up, in float32 at least."""

    def __init__(self, hidden: Tensor, weights: Any) -> None:
        self.hidden: list[Tensor] = []
        self.weights = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
        self.inputs = list(weights)

    def add(self, made: _Made, gradient: Tensor) -> None:
        hidden, *weights = torch.autograd.grad(made.edge, [made.leaf, *self.inputs], gradient.to(made.dtype))
        self.hidden.append(hidden)
        for total, part in zip(self.weights, weights, strict=True):
            total += part

    def result(self) -> tuple[Tensor, ...]:
        weights = (total.to(w.dtype) for total, w in zip(self.weights, self.inputs, strict=True))
        return (torch.cat(self.hidden), *weights)
