"""Tensor parallelism: the matrices of attention and feed-forward layers cut between ranks that compute the same rows."""

from typing import Any

from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import PreTrainedModel

from rlhf_lightning.errors import UserError

STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}


def split(network: nn.Module, mesh: Any) -> None:
    """Cut each transformer in a network by the plan that its config brings; embeddings, norms and heads stay whole.

    Every rank of the mesh has built the same weights, and keeps its part of them.

    Args:
        network: Holds one transformer or more.
        mesh: One-dimensional device mesh of the ranks that compute the same rows.

    Raises:
        UserError: If there is no such plan, if it has layers of a kind unknown here, or the heads can't be dealt out.
    """
    for model in network.modules():
        if isinstance(model, PreTrainedModel) and model.base_model is model:
            plan = plan_of(model, mesh.size())
            parallelize_module(model, mesh, {name: STYLES[style]() for name, style in plan.items()})


def plan_of(model: PreTrainedModel, size: int) -> dict[str, str]:
    """Layer names, with a star for their number, and how each is cut.

    Args:
        model: The transformer without its head.
        size: Between how many ranks.

    Raises:
        UserError: See :func:`split`.
    """
    config = model.config.get_text_config()
    plan: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    other = sorted(set(plan.values()) - STYLES.keys())
    if not plan or other:
        why = f"has layers that are cut {', '.join(other)}" if other else "brings no plan"
        raise UserError(
            f"tensor parallelism: {config.model_type} {why}, which is not known here; use -c configs/strategy/fsdp2.yaml"
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if (count := getattr(config, name, None)) is not None and count % size:
            raise UserError(f"tensor parallelism: {name} {count} can't be dealt out to {size} ranks")
    return plan
