"""PPO-ptx: the gradient of plain language modelling beside that of PPO, against forgetting."""

from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.batches import PromptBatch, SequenceBatch
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.language_model import nll_loss
from rlhf_lightning.models.routers import take_router_loss
from rlhf_lightning.modules.online import fewest
from rlhf_lightning.rollouts.buffer import parts


def texts_of(batch: PromptBatch, coef: float) -> SequenceBatch | None:
    """The rows of text that an iteration learns beside its rollout; None without a coefficient.

    Raises:
        UserError: If there is a coefficient and no text.
    """
    if not coef:
        return None
    if batch.pretraining is None:
        raise UserError(
            f"model.loss.ptx_coef is {coef:g}, and the data bring no text: set data to a PretrainingMixDataModule"
        )
    return batch.pretraining


def share(texts: SequenceBatch, number: int, of: int) -> SequenceBatch:
    """Every ``of``-th row from ``number`` on: each minibatch of a pass has its own."""
    rows = slice(number, None, of)
    return SequenceBatch(texts.input_ids[rows], texts.attention_mask[rows], texts.response_mask[rows], texts.normalizer)


def add_pretraining(module: Any, texts: SequenceBatch) -> None:
    r"""Add the gradient of :math:`\gamma` times the mean negative log-likelihood of a token to those that stand.

    PPO's loss is a token mean, too, so that at :math:`\gamma = 1` a token of text weighs as much as one of a response where
    there are as many of them. InstructGPT's 27.8 belongs to a normalisation that it does not state.

    Args:
        module: PPO, in the midst of an optimizer step.
        texts: Of this minibatch, on this rank.

    Source: Ouyang et al. 2022, eq. 2, https://arxiv.org/abs/2203.02155
    """
    counted = texts.response_mask[:, 1:]
    tokens: Tensor = module.all_sum(counted.sum())
    size = module.update.micro_batch_size
    for rows in parts(torch.arange(len(counted), device=counted.device), size, fewest(module, size, len(counted))):
        inputs = texts.input_ids[rows], texts.attention_mask[rows], texts.response_mask[rows]
        output = module.actor_critic(*inputs)
        take_router_loss(module)  # that of the responses is in the step already
        loss = nll_loss(output.logprobs, counted[rows]).sum()
        module.update_means.update({"loss/ptx_avg": (loss, counted[rows].sum())})
        scale = module.loss.ptx_coef * module.trainer.world_size / tokens
        # The critic takes part with nothing: DDP waits for the gradient of every weight.
        module.manual_backward(module.guard.saw(texts, loss * scale + 0 * output.values.sum()))
