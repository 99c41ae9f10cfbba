"""Supervised fine-tuning: the first stage."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from rlhf_lightning.batches import SequenceBatch
from rlhf_lightning.functional.language_model import nll_loss
from rlhf_lightning.functional.masked import masked_sum
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.policy import PolicyNetwork, PolicyOutput
from rlhf_lightning.models.spec import Model, as_spec
from rlhf_lightning.modules.batch_checks import reads
from rlhf_lightning.modules.guard import StepGuard, with_router_loss
from rlhf_lightning.modules.half_precision import prepare_precision
from rlhf_lightning.modules.handoff import check_context, shard_if_asked, training_tokenizer
from rlhf_lightning.modules.master_weights import build_optimizer
from rlhf_lightning.modules.metrics import Means, log_evaluation, log_step
from rlhf_lightning.modules.optimization import OptimizerFactory, Schedule, scheduled, trained_parameters
from rlhf_lightning.modules.showing import Sample, as_samples, sampled_responses

NAMES = ("loss", "entropy", "mean_token_accuracy")


class SFTModule(LightningModule):
    """Maximum likelihood of the supervised tokens (Ouyang et al. 2022, section 3.5).

    Rows with a column ``weight`` count so many times; on samples of a policy weighted by their reward that is reward-weighted
    regression (Peters and Schaal 2007).
    """

    def __init__(
        self,
        policy: Model,
        optimizer: OptimizerFactory = lambda params: torch.optim.AdamW(params, lr=2e-5),
        schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
        sampling: SamplingParameters = SamplingParameters(),  # noqa: B008  (frozen)
    ) -> None:
        """Remember what to build; networks are built in ``configure_model``.

        Args:
            policy: The model to tune.
            optimizer: Makes the optimizer of the parameters.
            schedule: Of the learning rate, in optimizer steps.
            sampling: How the samples that a person sees are drawn.
        """
        super().__init__()
        self.sampling = sampling
        self.policy_spec, self.optimizer_factory, self.schedule = as_spec(policy), optimizer, schedule
        self.model_path = self.policy_spec.path
        self.policy: PolicyNetwork | None = None
        self.train_means, self.eval_means = Means(NAMES, totals=["num_tokens"]), Means(NAMES, totals=["num_tokens"])
        self.guard = StepGuard()

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = reads(
        SequenceBatch
    )

    def configure_model(self) -> None:
        """Load or build the policy, once."""
        prepare_precision(self)
        if self.policy is None:
            self.tokenizer = training_tokenizer(self, self.policy_spec.path)
            self.policy = PolicyNetwork(load_causal_lm(self.policy_spec, self.tokenizer))
            check_context(self, self.policy.network)
            shard_if_asked(self, self.policy)

    def forward(self, batch: SequenceBatch) -> PolicyOutput:
        """Log-probabilities of the supervised tokens."""
        assert self.policy is not None
        inputs = batch.input_ids, batch.attention_mask, batch.response_mask
        return self.policy(*inputs, equal_weights=batch.weights is None)

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        loss, counted = self._loss(batch)
        self.train_means.update(counted)
        return self.guard.saw(batch, with_router_loss(self, loss / batch.normalizer))

    def _loss(self, batch: SequenceBatch) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor | int]]]:
        """Summed loss, and what it and the diagnostics are means of."""
        output, mask = self(batch), batch.response_mask[:, 1:]
        nll, tokens, weights = nll_loss(output.logprobs, mask), mask.sum(), batch.weights
        loss = nll.sum() if weights is None else (weights * nll).sum()
        counted: dict[str, tuple[Tensor, Tensor | int]] = {
            "loss": (loss, tokens if weights is None else (weights * mask.sum(1)).sum()),
            "entropy": (masked_sum(output.entropy, mask), tokens),
            "mean_token_accuracy": (output.greedy.sum(), tokens),
            "num_tokens": (batch.attention_mask.sum(), 1),
        }
        return loss, counted

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        log_step(self, optimizer, progress=("loss", "mean_token_accuracy"))

    def show(self, batch: SequenceBatch, count: int) -> list[Sample]:
        """A few sampled responses; the score is their mean log-probability a token."""
        assert self.policy is not None
        responses = sampled_responses(self.policy, self.tokenizer, batch, count, self.sampling)
        output = self.policy(responses.input_ids, responses.attention_mask, responses.sequence_mask)
        return as_samples(responses, output.logprobs.sum(1) / responses.response_mask.sum(1), count)

    def predict_step(self, batch: SequenceBatch, batch_idx: int) -> list[Sample]:
        return self.show(batch, len(batch.input_ids))

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        self.eval_means.update(self._loss(batch)[1])

    def on_validation_epoch_end(self) -> None:
        log_evaluation(self, self.eval_means)

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    def configure_optimizers(self) -> Any:
        return scheduled(build_optimizer(self, trained_parameters(self)), self.schedule, self.trainer)
