"""Direct preference optimisation and its relatives: alignment without a reward model or sampling."""

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from rlhf_lightning.batches import PreferenceBatch
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.losses import DPOLoss, PairLoss
from rlhf_lightning.losses.checks import require_interface
from rlhf_lightning.losses.pairs import Counted, Needs, Pairs, ScoredResponses
from rlhf_lightning.models.frozen import Frozen, policy_as_it_starts
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.policy import PolicyNetwork, PolicyOutput
from rlhf_lightning.models.spec import Model, ModelSpec, as_spec, as_wide_as
from rlhf_lightning.modules.batch_checks import reads
from rlhf_lightning.modules.guard import StepGuard, with_router_loss
from rlhf_lightning.modules.half_precision import place_reference, prepare_precision, warn_of_rounded_reference
from rlhf_lightning.modules.handoff import check_context, shard_if_asked, training_tokenizer
from rlhf_lightning.modules.master_weights import build_optimizer
from rlhf_lightning.modules.metrics import Means, log_evaluation, log_step
from rlhf_lightning.modules.moving_reference import MovingReference
from rlhf_lightning.modules.optimization import OptimizerFactory, Schedule, scheduled, trained_parameters
from rlhf_lightning.modules.pair_metrics import NAMES, of_rewards, of_tokens
from rlhf_lightning.modules.ranks import over_ranks
from rlhf_lightning.modules.reference_logps import add_reference_logps
from rlhf_lightning.modules.showing import Sample, as_samples, sampled_responses


class DPOModule(LightningModule):
    """The policy is its own reward model (Rafailov et al. 2023); the loss object decides which of the family it is."""

    def __init__(
        self,
        policy: Model,
        loss: PairLoss = DPOLoss(),  # noqa: B008  (frozen)
        reference: Model | None = None,
        optimizer: OptimizerFactory = lambda params: torch.optim.AdamW(params, lr=1e-6),
        schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
        sampling: SamplingParameters = SamplingParameters(),  # noqa: B008  (frozen)
        precompute_reference: bool = False,
        moving_reference: MovingReference | None = None,
    ) -> None:
        """Remember what to build; networks are built in ``configure_model``.

        Args:
            policy: The model to align, usually the SFT policy.
            loss: On a pair of responses.
            reference: What log-ratios are taken against; None for the policy as it starts. A loss that needs none loads none.
            optimizer: Makes the optimizer of the parameters.
            schedule: Of the learning rate, in optimizer steps.
            sampling: How the samples that a person sees are drawn.
            precompute_reference: Compute the reference's log-probabilities of all rows before training, keep them on disk for
                later runs on the same rows and reference, and let the reference go. It costs a pass over the rows, which
                pays from the second epoch, or run, on.
            moving_reference: How the reference follows the policy (TR-DPO); None for one that stays.

        Raises:
            UserError: If the loss and what is said of the reference don't go together.
        """
        super().__init__()
        policy, reference = as_spec(policy), as_spec(reference)
        require_interface("loss", loss, PairLoss)
        check_reference(loss, reference, precompute_reference, moving_reference)
        if moving_reference is not None:
            moving_reference.check(policy, precompute_reference)
        self.sampling = sampling
        self.policy_spec, self.reference_spec, self.loss = policy, as_wide_as(policy, reference), loss
        self.optimizer_factory, self.schedule = optimizer, schedule
        self.precompute_reference, self.moving_reference = precompute_reference, moving_reference
        self.model_path = policy.path
        self.policy: PolicyNetwork | None = None
        self.reference: Frozen | None = None
        names = (*NAMES, *loss.measures)
        self.train_means, self.eval_means = Means(names, totals=["num_tokens"]), Means(names, totals=["num_tokens"])
        self.guard = StepGuard()

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = reads(
        PreferenceBatch
    )

    def configure_model(self) -> None:
        """Load the policy and its reference, once."""
        prepare_precision(self)
        if self.policy is not None:
            return
        self.tokenizer = training_tokenizer(self, self.policy_spec.path, self.reference_spec.path)
        self.policy = PolicyNetwork(load_causal_lm(self.policy_spec, self.tokenizer))
        if self.loss.needs_reference:
            self.reference = self._load_reference(self.policy)
        check_context(self, self.policy.network)
        shard_if_asked(self, self.policy)
        if self.reference is None:
            return
        shard_if_asked(self, self.reference.own_network)
        if self.moving_reference is not None:
            strategy = None if self._trainer is None else self._trainer.strategy
            self.moving_reference.check_networks(self.policy, self.reference.network, strategy)
            self.moved = self.reference.network  # in the module tree, for checkpoints must hold what changes
        if self.precompute_reference and self.trainer.state.fn == TrainerFn.FITTING:
            add_reference_logps(self, self.reference)
            self.reference = None

    def _load_reference(self, policy: PolicyNetwork) -> Frozen:
        if self.reference_spec == self.policy_spec:
            return policy_as_it_starts(policy, self.policy_spec, self.tokenizer, policy)
        warn_of_rounded_reference(self)
        return Frozen(PolicyNetwork(load_causal_lm(self.reference_spec, self.tokenizer)))

    def on_fit_start(self) -> None:
        if Needs.WHOLE_STEP in self.loss.needs and self.trainer.accumulate_grad_batches > 1:
            raise UserError(
                f"{type(self.loss).__name__} looks at all pairs of an optimizer step at once: set "
                "trainer.accumulate_grad_batches to 1 (more ranks do no harm)"
            )
        self.on_validation_start()

    def on_validation_start(self) -> None:
        place_reference(self, self.reference)

    on_test_start = on_predict_start = on_validation_start

    def forward(self, batch: PreferenceBatch) -> PolicyOutput:
        """Log-probabilities of the response tokens of chosen and rejected, in one forward."""
        assert self.policy is not None
        inputs = batch.input_ids, batch.attention_mask, batch.response_mask
        return self.policy(*inputs, share_prompts=True, collisions=Needs.COLLISIONS in self.loss.needs)

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        loss, counted = self._loss(batch)
        self.train_means.update(counted)
        return self.guard.saw(batch, with_router_loss(self, loss / batch.normalizer))

    def _loss(self, batch: PreferenceBatch) -> tuple[Tensor, Counted]:
        """Summed loss, and what it and the diagnostics are means of."""
        output = self(batch)
        gather = self._of_all_ranks if Needs.WHOLE_STEP in self.loss.needs else None
        pairs = Pairs(self._scored(batch, output), gather)
        loss = self._pair_losses(pairs, batch)
        counted = of_rewards(self.loss, loss, pairs) | of_tokens(output, pairs) | self.loss.counted(pairs)
        return loss.sum(), counted | {"num_tokens": (batch.attention_mask.sum(), 1)}

    def _pair_losses(self, pairs: Pairs, batch: PreferenceBatch) -> Tensor:
        """Of each pair, shape (pairs,): a label of probability p is p of it and 1 - p of its opposite."""
        p = batch.probability
        if p is None or not bool((p < 1).any()):
            loss = self.loss.pairs(pairs)
        elif Needs.WHOLE_STEP in self.loss.needs:
            raise UserError(
                f"{type(self.loss).__name__} compares pairs with each other and takes sure labels alone: leave out the "
                "column of probabilities, and ties"
            )
        else:
            loss = p * self.loss.pairs(pairs) + (1 - p) * self.loss.pairs(pairs.swapped())
        return loss if batch.weight is None else batch.weight * loss

    def _scored(self, batch: PreferenceBatch, output: PolicyOutput) -> ScoredResponses:
        """What the loss is given of chosen and rejected; the reference's part from before training or computed now."""
        mask, sums, tokens = batch.response_mask[:, 1:], None, None
        if self.reference is not None:
            inputs = batch.input_ids, batch.attention_mask, batch.response_mask
            tokens = self.reference(*inputs, share_prompts=True).logprobs
        elif self.loss.needs_reference:
            sums = batch.reference_logps
        return ScoredResponses(output.logprobs, mask, tokens, sums, output.collisions)

    def _of_all_ranks(self, values: Tensor) -> tuple[Tensor, int]:
        parts = over_ranks(self.trainer, values.detach().cpu())
        return torch.cat(parts).to(values.device), sum(len(part) for part in parts[: self.global_rank])

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's, and then the reference may follow."""
        super().optimizer_step(*args, **kwargs)
        if self.moving_reference is not None:
            assert self.policy is not None
            self.moving_reference.move(self.policy, self.moved, self.global_step + 1)  # counted when this returns

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        log_step(self, optimizer, progress=("loss", "rewards/accuracies", "rewards/margins"))

    def show(self, batch: PreferenceBatch, count: int) -> list[Sample]:
        """A few sampled responses; the score is their implicit reward, or without a reference their mean log-probability."""
        assert self.policy is not None
        responses = sampled_responses(self.policy, self.tokenizer, batch, count, self.sampling)
        inputs = responses.input_ids, responses.attention_mask, responses.sequence_mask
        scored = ScoredResponses(self.policy(*inputs).logprobs, responses.sequence_mask[:, 1:])
        if not self.loss.needs_reference:
            return as_samples(responses, self.loss.rewards(scored), count)
        if self.reference is None:
            return as_samples(responses, scored.means, count)
        scored = replace(scored, ref_logprobs=self.reference(*inputs).logprobs)
        return as_samples(responses, self.loss.rewards(scored), count)

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> list[Sample]:
        return self.show(batch, len(batch.margin))

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        self.eval_means.update(self._loss(batch)[1])

    def on_validation_epoch_end(self) -> None:
        log_evaluation(self, self.eval_means)

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    def configure_optimizers(self) -> Any:
        return scheduled(build_optimizer(self, trained_parameters(self)), self.schedule, self.trainer)


def check_reference(
    loss: PairLoss, reference: ModelSpec | None, precompute_reference: bool, moving_reference: MovingReference | None
) -> None:
    """Hold what a loss reads against what is said of the reference.

    Raises:
        UserError: If something would be given that nobody reads, or be missing.
    """
    name = type(loss).__name__
    given = {
        "reference": reference is not None,
        "precompute_reference": precompute_reference,
        "moving_reference": moving_reference is not None,
    }
    if not loss.needs_reference and any(given.values()):
        raise UserError(f"{name} reads no reference; leave out {' and '.join(key for key in given if given[key])}")
    if precompute_reference and Needs.REFERENCE_TOKENS in loss.needs:
        raise UserError(
            f"{name} reads the reference's log-probability of each token, and precompute_reference keeps sums alone; set it "
            "to false"
        )
