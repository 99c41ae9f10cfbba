"""Kahneman-Tversky optimisation: alignment to single answers that somebody liked or disliked, without pairs."""

import logging
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from rlhf_lightning.batches import UnpairedBatch
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.logprobs import sequence_logprobs
from rlhf_lightning.functional.masked import masked_sum
from rlhf_lightning.functional.unpaired import kto_baseline
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.losses import KTOLoss, UnpairedLoss
from rlhf_lightning.losses.checks import require_interface
from rlhf_lightning.models.frozen import Frozen, policy_as_it_starts
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.policy import PolicyNetwork, PolicyOutput
from rlhf_lightning.models.spec import Model, as_spec, as_wide_as
from rlhf_lightning.modules.batch_checks import reads
from rlhf_lightning.modules.guard import StepGuard, with_router_loss
from rlhf_lightning.modules.half_precision import (
    computes_in_half,
    place_reference,
    prepare_precision,
    warn_of_rounded_reference,
)
from rlhf_lightning.modules.handoff import check_context, shard_if_asked, training_tokenizer
from rlhf_lightning.modules.master_weights import build_optimizer
from rlhf_lightning.modules.metrics import Means, log_evaluation, log_step
from rlhf_lightning.modules.optimization import OptimizerFactory, Schedule, scheduled, trained_parameters
from rlhf_lightning.modules.running_mean import RunningMean
from rlhf_lightning.modules.showing import Sample, as_samples, sampled_responses

log = logging.getLogger(__name__)

NAMES = (
    "loss", "kl", "delta", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "logits/chosen",
    "logits/rejected", "entropy",
)  # fmt: skip
BALANCE = (1.0, 4 / 3)  # of weight times number, liked over disliked: eq. 8 of the paper
Counted = dict[str, tuple[Tensor, Tensor | int]]


class UnpairedMeans(Means):
    """With the margin: the difference of two means, for liked and disliked answers need not be equally many."""

    def compute(self) -> dict[str, Tensor]:
        values = super().compute()
        if {"rewards/chosen", "rewards/rejected"} <= values.keys():
            values["rewards/margins"] = values["rewards/chosen"] - values["rewards/rejected"]
        return values


class KTOModule(LightningModule):
    """Answers are judged one by one (Ethayarajh et al. 2024); the loss object decides which of the family it is."""

    def __init__(
        self,
        policy: Model,
        loss: UnpairedLoss = KTOLoss(),  # noqa: B008  (frozen)
        reference: Model | None = None,
        optimizer: OptimizerFactory = lambda params: torch.optim.AdamW(params, lr=1e-6),
        schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
        sampling: SamplingParameters = SamplingParameters(),  # noqa: B008  (frozen)
    ) -> None:
        """Remember what to build; networks are built in ``configure_model``.

        Args:
            policy: The model to align, usually the SFT policy.
            loss: On the log-ratio of an answer. KTO's depends on the micro-batch, for its reference point is estimated on it.
            reference: What the log-ratios are taken against; None for the policy as it starts.
            optimizer: Makes the optimizer of the parameters.
            schedule: Of the learning rate, in optimizer steps.
            sampling: How the samples that a person sees are drawn.
        """
        super().__init__()
        policy, reference = as_spec(policy), as_spec(reference)
        require_interface("loss", loss, UnpairedLoss)
        self.policy_spec, self.reference_spec, self.loss = policy, as_wide_as(policy, reference), loss
        self.optimizer_factory, self.schedule, self.sampling = optimizer, schedule, sampling
        self.model_path = policy.path
        self.policy: PolicyNetwork | None = None
        self.reference: Frozen | None = None
        self.seen = RunningMean()
        self.train_means, self.eval_means = (UnpairedMeans(NAMES, totals=["num_tokens"]) for _ in range(2))
        self.guard = StepGuard()

    def setup(self, stage: str) -> None:
        """Look at the data before anything is loaded."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if getattr(datamodule, "kind", "unpaired") != "unpaired":
            raise UserError(
                f"data is {type(datamodule).__name__}; KTOModule learns from UnpairedDataModule, which takes pairs apart itself"
            )
        if self.loss.baseline == "mismatched" and getattr(datamodule, "batch_size", 2) < 2:
            raise UserError(
                f"data.batch_size is {datamodule.batch_size}: {type(self.loss).__name__} measures the KL on the answer of "
                "another row of the same batch and rank; give at least 2, or an APOZeroUnpairedLoss"
            )
        counts = datamodule.label_counts() if stage == "fit" and hasattr(datamodule, "label_counts") else None
        if counts is not None and self.trainer.is_global_zero:
            report_balance(self.loss, *counts)

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = reads(
        UnpairedBatch
    )

    def configure_model(self) -> None:
        """Load the policy and its reference, once."""
        prepare_precision(self)
        if self.policy is not None:
            return
        self.tokenizer = training_tokenizer(self, self.policy_spec.path, self.reference_spec.path)
        self.policy = PolicyNetwork(load_causal_lm(self.policy_spec, self.tokenizer))
        if self.reference_spec == self.policy_spec:
            self.reference = policy_as_it_starts(self.policy, self.policy_spec, self.tokenizer, self.policy)
        else:
            warn_of_rounded_reference(self)
            self.reference = Frozen(PolicyNetwork(load_causal_lm(self.reference_spec, self.tokenizer)))
        check_context(self, self.policy.network)
        shard_if_asked(self, self.policy)
        shard_if_asked(self, self.reference.own_network)

    def on_fit_start(self) -> None:
        place_reference(self, self.reference)

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def forward(self, batch: UnpairedBatch) -> PolicyOutput:
        """Log-probabilities of the answers' tokens."""
        assert self.policy is not None
        return self.policy(*inputs(batch, slice(len(batch.label))), share_prompts=True)

    def training_step(self, batch: UnpairedBatch, batch_idx: int) -> Tensor:
        loss, logratio, counted = self._loss(batch)
        self.train_means.update(counted)
        if self.loss.baseline == "running_mean":
            self.seen.saw(logratio)
        return self.guard.saw(batch, with_router_loss(self, loss / batch.normalizer))

    def _loss(self, batch: UnpairedBatch) -> tuple[Tensor, Tensor, Counted]:
        """Summed loss, the log-ratio of each answer, and what loss and diagnostics are means of."""
        rows, mismatched = len(batch.label), self.loss.baseline == "mismatched"
        ref_logps = self._reference_logps(batch, slice(2 * rows if mismatched else rows))
        shift = self._mismatched_kl(batch, ref_logps[rows:]) if mismatched else ref_logps.new_tensor(self.seen.value)
        output, mask = self(batch), batch.response_mask[:rows, 1:]
        logps = sequence_logprobs(output.logprobs, mask)
        logratio = logps - ref_logps[:rows]
        loss = self.loss.rows(logratio, batch.label, shift)
        counted = self._diagnostics(output, logps, logratio, batch) | {"loss": (loss.sum(), rows)}
        if self.loss.baseline != "none":
            counted |= {"kl": (shift, 1)} if mismatched else {"delta": (self.loss.reward_scale * shift, 1)}
        return loss.sum(), logratio, counted

    def _reference_logps(self, batch: UnpairedBatch, read: slice) -> Tensor:
        """The reference's log-probability of each of these answers. Shape (answers,)."""
        assert self.reference is not None
        assert self.policy is not None
        rows = len(batch.label)
        if read.stop == rows or not computes_in_half(self, self.policy):
            logprobs = self.reference(*inputs(batch, read), share_prompts=True).logprobs
        else:  # in the policy's two calls: half precision rounds differently in another batch
            own = self.reference(*inputs(batch, slice(rows)), share_prompts=True).logprobs
            logprobs = torch.cat([own, self.reference(*inputs(batch, slice(rows, read.stop))).logprobs])
        return sequence_logprobs(logprobs, batch.response_mask[read, 1:])

    @torch.no_grad()
    def _mismatched_kl(self, batch: UnpairedBatch, ref_logps: Tensor) -> Tensor:
        """KTO's reference point, over all ranks; ``ref_logps`` are of prompts with each other's answers, shape (rows,)."""
        assert self.policy is not None
        rows = len(batch.label)
        part = slice(rows, None)
        logps = sequence_logprobs(self.policy(*inputs(batch, part)).logprobs, batch.response_mask[part, 1:])
        # A row that is alone in its batch (the last of an epoch may be) has no answer but its own: it tells nothing.
        ratios = (logps - ref_logps)[: rows if rows > 1 else 0]
        return kto_baseline(ratios, all_sum=self._all_sum)

    def _diagnostics(self, output: PolicyOutput, logps: Tensor, logratio: Tensor, batch: UnpairedBatch) -> Counted:
        mask, rewards = batch.response_mask[: len(logps), 1:], self.loss.reward_scale * logratio
        counted: Counted = {
            "entropy": (masked_sum(output.entropy, mask), mask.sum()),
            "num_tokens": (batch.attention_mask[: len(logps)].sum(), 1),
        }
        for side, rows in (("chosen", batch.label), ("rejected", ~batch.label)):
            tokens = mask & rows[:, None]
            counted |= {
                f"rewards/{side}": (masked_sum(rewards, rows), rows.sum()),
                f"logps/{side}": (masked_sum(logps, rows), rows.sum()),
                f"logits/{side}": (masked_sum(output.mean_logit, tokens), tokens.sum()),
            }
        return counted

    def _all_sum(self, x: Tensor) -> Tensor:
        """Sum over ranks."""
        return self.trainer.strategy.reduce(x.clone(), reduce_op="sum") if self.trainer.world_size > 1 else x

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        log_step(self, optimizer, progress=("loss", "rewards/margins", "kl"))
        if self.loss.baseline == "running_mean":
            self.seen.step(self._all_sum)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["kto"] = self.seen.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen.load_state(checkpoint["kto"])

    def show(self, batch: UnpairedBatch, count: int) -> list[Sample]:
        """A few sampled responses; the score is their implicit reward."""
        assert self.policy is not None
        assert self.reference is not None
        responses = sampled_responses(self.policy, self.tokenizer, batch, min(count, len(batch.label)), self.sampling)
        read = responses.input_ids, responses.attention_mask, responses.sequence_mask
        log_ratio = self.policy(*read).logprobs - self.reference(*read).logprobs
        return as_samples(responses, self.loss.reward_scale * log_ratio.sum(1), count)

    def predict_step(self, batch: UnpairedBatch, batch_idx: int) -> list[Sample]:
        return self.show(batch, len(batch.label))

    def validation_step(self, batch: UnpairedBatch, batch_idx: int) -> None:
        self.eval_means.update(self._loss(batch)[2])

    def on_validation_epoch_end(self) -> None:
        log_evaluation(self, self.eval_means)

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    def configure_optimizers(self) -> Any:
        return scheduled(build_optimizer(self, trained_parameters(self)), self.schedule, self.trainer)


def inputs(batch: UnpairedBatch, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """What a network reads of these rows."""
    return batch.input_ids[rows], batch.attention_mask[rows], batch.response_mask[rows]


def report_balance(loss: UnpairedLoss, liked: int, disliked: int) -> None:
    """Say how many rows were liked and disliked, aloud if the loss does not make up for it."""
    ratio = loss.desirable_weight * liked / max(loss.undesirable_weight * disliked, 1e-12)
    said = "%d liked and %d disliked rows; weighted (desirable_weight %g, undesirable_weight %g) their ratio is %.2f"
    numbers = liked, disliked, loss.desirable_weight, loss.undesirable_weight, ratio
    low, high = BALANCE
    if low - 1e-9 <= ratio <= high + 1e-9:
        log.info(said, *numbers)
        return
    wanted = [bound * loss.undesirable_weight * disliked / liked for bound in BALANCE]
    log.warning(
        f"{said}, where KTO's authors advise 1 to 4/3: set loss.desirable_weight to %.3g to %.3g", *numbers, *wanted
    )
