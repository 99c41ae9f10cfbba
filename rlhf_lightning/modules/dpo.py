"""Direct preference optimisation: alignment without a reward model or sampling."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from rlhf_lightning.batches import PreferenceBatch
from rlhf_lightning.functional.logprobs import sequence_logprobs
from rlhf_lightning.functional.masked import masked_sum
from rlhf_lightning.functional.ranking import preference_accuracy
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.losses import DPOLoss, PairLoss
from rlhf_lightning.models.frozen import Frozen, policy_as_it_starts
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.policy import PolicyNetwork, PolicyOutput
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules.guard import StepGuard
from rlhf_lightning.modules.handoff import check_context, shard_if_asked, training_tokenizer
from rlhf_lightning.modules.metrics import Means, log_evaluation, log_step
from rlhf_lightning.modules.optimization import OptimizerFactory, Schedule, scheduled, trained_parameters
from rlhf_lightning.modules.reference_logps import add_reference_logps
from rlhf_lightning.modules.showing import Sample, as_samples, sampled_responses

NAMES = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
    "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy",
)  # fmt: skip


class DPOModule(LightningModule):
    """The policy is its own reward model (Rafailov et al. 2023); the loss object decides which of the family it is."""

    def __init__(
        self,
        policy: ModelSpec,
        loss: PairLoss = DPOLoss(),  # noqa: B008  (frozen)
        reference: ModelSpec | None = None,
        optimizer: OptimizerFactory = lambda params: torch.optim.AdamW(params, lr=1e-6),
        schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
        sampling: SamplingParameters = SamplingParameters(),  # noqa: B008  (frozen)
        precompute_reference: bool = False,
    ) -> None:
        """Remember what to build; networks are built in ``configure_model``.

        Args:
            policy: The model to align, usually the SFT policy.
            loss: On the log-ratios of a pair.
            reference: What the log-ratios are taken against; None for the policy as it starts.
            optimizer: Makes the optimizer of the parameters.
            schedule: Of the learning rate, in optimizer steps.
            sampling: How the samples that a person sees are drawn.
            precompute_reference: Compute the reference's log-probabilities of all rows before training, keep them on disk for
                later runs on the same rows and reference, and let the reference go. It costs a pass over the rows, which
                pays from the second epoch, or run, on.
        """
        super().__init__()
        self.sampling = sampling
        self.policy_spec, self.reference_spec, self.loss = policy, reference or policy, loss
        self.optimizer_factory, self.schedule, self.precompute_reference = optimizer, schedule, precompute_reference
        self.model_path = policy.path
        self.policy: PolicyNetwork | None = None
        self.reference: Frozen | None = None
        self.train_means, self.eval_means = Means(NAMES, totals=["num_tokens"]), Means(NAMES, totals=["num_tokens"])
        self.guard = StepGuard()

    def configure_model(self) -> None:
        """Load the policy and its reference, once."""
        if self.policy is not None:
            return
        self.tokenizer = training_tokenizer(self, self.policy_spec.path, self.reference_spec.path)
        self.policy = PolicyNetwork(load_causal_lm(self.policy_spec, self.tokenizer))
        if self.reference_spec == self.policy_spec:
            self.reference = policy_as_it_starts(self.policy, self.policy_spec, self.tokenizer, self.policy)
        else:
            self.reference = Frozen(PolicyNetwork(load_causal_lm(self.reference_spec, self.tokenizer)))
        check_context(self, self.policy.network)
        shard_if_asked(self, self.policy)
        shard_if_asked(self, self.reference.own_network)
        if self.precompute_reference and self.trainer.state.fn == TrainerFn.FITTING:
            add_reference_logps(self, self.reference)
            self.reference = None

    def on_fit_start(self) -> None:
        if self.reference is not None:
            self.reference.to(self.device)

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def forward(self, batch: PreferenceBatch) -> PolicyOutput:
        """Log-probabilities of the response tokens of chosen and rejected, in one forward."""
        assert self.policy is not None
        return self.policy(batch.input_ids, batch.attention_mask, batch.response_mask, share_prompts=True)

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        loss, counted = self._loss(batch)
        self.train_means.update(counted)
        return self.guard.saw(batch, loss / batch.normalizer)

    def _loss(self, batch: PreferenceBatch) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor | int]]]:
        """Summed loss, and what it and the diagnostics are means of."""
        mask = batch.response_mask[:, 1:]
        output = self(batch)
        logps = sequence_logprobs(output.logprobs, mask)
        chosen_logratio, rejected_logratio = (logps - self._reference_logps(batch)).chunk(2)
        loss = self.loss.pairs(chosen_logratio, rejected_logratio)
        counted = self._rewards(loss, chosen_logratio, rejected_logratio) | self._diagnostics(output, logps, mask)
        return loss.sum(), counted | {"num_tokens": (batch.attention_mask.sum(), 1)}

    def _reference_logps(self, batch: PreferenceBatch) -> Tensor:
        """Of each response, from before training or computed now. Shape (2 * pairs,)."""
        if self.reference is None:
            assert batch.reference_logps is not None
            return batch.reference_logps
        reference = self.reference(batch.input_ids, batch.attention_mask, batch.response_mask, share_prompts=True)
        return sequence_logprobs(reference.logprobs, batch.response_mask[:, 1:])

    def _rewards(self, loss: Tensor, chosen: Tensor, rejected: Tensor) -> dict[str, tuple[Tensor, Tensor | int]]:
        scale, pairs = self.loss.reward_scale, len(chosen)
        return {
            "loss": (loss.sum(), pairs),
            "rewards/chosen": (scale * chosen.sum(), pairs),
            "rewards/rejected": (scale * rejected.sum(), pairs),
            "rewards/accuracies": (preference_accuracy(chosen, rejected).sum(), pairs),
            "rewards/margins": (scale * (chosen - rejected).sum(), pairs),
        }

    def _diagnostics(self, output: PolicyOutput, logps: Tensor, mask: Tensor) -> dict[str, tuple[Tensor, Tensor | int]]:
        pairs = len(logps) // 2
        (chosen, rejected), (chosen_logit, rejected_logit) = mask.chunk(2), output.mean_logit.chunk(2)
        return {
            "logps/chosen": (logps[:pairs].sum(), pairs),
            "logps/rejected": (logps[pairs:].sum(), pairs),
            "logits/chosen": (masked_sum(chosen_logit, chosen), chosen.sum()),
            "logits/rejected": (masked_sum(rejected_logit, rejected), rejected.sum()),
            "entropy": (masked_sum(output.entropy, mask), mask.sum()),
            "mean_token_accuracy": (output.greedy[:pairs].sum(), chosen.sum()),
        }

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        log_step(self, optimizer, progress=("loss", "rewards/accuracies", "rewards/margins"))

    def show(self, batch: PreferenceBatch, count: int) -> list[Sample]:
        """A few sampled responses; the score is their implicit reward, or without a reference their mean log-probability."""
        assert self.policy is not None
        responses = sampled_responses(self.policy, self.tokenizer, batch, count, self.sampling)
        inputs = responses.input_ids, responses.attention_mask, responses.sequence_mask
        logprobs = self.policy(*inputs).logprobs
        if self.reference is None:
            return as_samples(responses, logprobs.sum(1) / responses.response_mask.sum(1), count)
        log_ratio = logprobs - self.reference(*inputs).logprobs
        return as_samples(responses, self.loss.reward_scale * log_ratio.sum(1), count)

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> list[Sample]:
        return self.show(batch, len(batch.margin))

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        self.eval_means.update(self._loss(batch)[1])

    def on_validation_epoch_end(self) -> None:
        log_evaluation(self, self.eval_means)

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    def configure_optimizers(self) -> Any:
        return scheduled(self.optimizer_factory(trained_parameters(self)), self.schedule, self.trainer)
