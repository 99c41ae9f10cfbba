"""Online DPO: pairs drawn from the policy as it is now, ranked by a reward or a judge, learnt from by any pair loss."""

import math
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.generation.native import engine_for
from rlhf_lightning.losses import DPOLoss, PairLoss
from rlhf_lightning.losses.checks import require_interface
from rlhf_lightning.losses.pairs import Needs, Pairs, ScoredResponses
from rlhf_lightning.models.frozen import Frozen, policy_as_it_starts
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.policy import PolicyNetwork, PolicyOutput
from rlhf_lightning.models.spec import Model, as_spec
from rlhf_lightning.modules.batch_checks import reads
from rlhf_lightning.modules.grpo_update import Groups, GRPOUpdate
from rlhf_lightning.modules.guard import StepGuard, with_router_loss
from rlhf_lightning.modules.half_precision import computes_in_half, prepare_precision
from rlhf_lightning.modules.handoff import check_context, shard_if_asked, training_tokenizer
from rlhf_lightning.modules.master_weights import build_optimizer
from rlhf_lightning.modules.metrics import Means, log_training
from rlhf_lightning.modules.online import (
    all_sum,
    answer_fixed_prompts,
    begin,
    check_sampling,
    clipped_step,
    count_without_signal,
    engine_gave_old_logprobs,
    fewest,
    log_fixed_prompts,
    log_iteration,
    measured,
    old_logprobs_of,
    place,
    policy_alone,
    refuse_trainer_steps,
    respond,
    scores_of,
    trainer_state,
)
from rlhf_lightning.modules.optimization import OptimizerFactory, Schedule, advance_schedule, trained_parameters
from rlhf_lightning.modules.plan import RunPlan, check_iterations, end_after_last, plan_run, planned_schedule
from rlhf_lightning.modules.ranks import of_this_rank, over_ranks
from rlhf_lightning.modules.rollout_metrics import EVALUATION, part_means, rollout_means
from rlhf_lightning.modules.showing import Sample, as_samples
from rlhf_lightning.rewards.failures import GuardedReward, IterationSkipped
from rlhf_lightning.rewards.reward import Reward
from rlhf_lightning.rollouts import mismatch
from rlhf_lightning.rollouts.buffer import Rollout
from rlhf_lightning.rollouts.collect import Responses, score_responses
from rlhf_lightning.rollouts.groups import repeated

NAMES = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
    "objective/scores_margin", "grad_norm", *mismatch.MEANS, *mismatch.LOWEST, *mismatch.HIGHEST,
)  # fmt: skip
OF_REFERENCE = ("objective/kl", "objective/kl_k3", "objective/non_score_reward", "objective/rlhf_reward")


def update_means() -> Means:
    """What an iteration's optimizer steps count."""
    return Means(NAMES, lowest=mismatch.LOWEST, highest=mismatch.HIGHEST)


class OnlineDPOModule(LightningModule):
    """One ``training_step`` is one iteration: draw groups, pair the best with the worst, take a step on the pairs.

    Source: Guo et al. 2024 (https://arxiv.org/abs/2402.04792).
    """

    def __init__(
        self,
        policy: Model,
        reward: Reward,
        loss: PairLoss = DPOLoss(),  # noqa: B008  (frozen)
        groups: Groups = Groups(size=2),  # noqa: B008  (frozen)
        sampling: SamplingParameters = SamplingParameters(),  # noqa: B008  (frozen)
        update: GRPOUpdate = GRPOUpdate(),  # noqa: B008  (frozen)
        optimizer: OptimizerFactory = lambda params: torch.optim.AdamW(params, lr=1e-6),
        schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
        iterations: int | None = None,
    ) -> None:
        """Remember what to build; networks are built in ``configure_model``.

        Args:
            policy: The model to align; as it starts it is also the reference.
            reward: Ranks the responses of a group; a judge does so as a ``WinRateReward``. Whatever it says, a response that
                was cut off ranks below all that ended.
            loss: On a pair of responses.
            groups: How many responses to a prompt are drawn; the best and the worst make its pair. Groups that tie make none.
            sampling: How responses are drawn, in training and in validation.
            update: Epochs; ``minibatch_size`` and ``micro_batch_size`` count responses, two a pair.
            optimizer: Makes the optimizer.
            schedule: Of the learning rate, in iterations unless ``interval`` says otherwise.
            iterations: Rollouts with their updates until the run ends, over as many epochs as that takes; None where
                ``trainer.max_epochs`` or ``trainer.max_steps`` (optimizer steps, of which an iteration has many) ends it.
        """
        super().__init__()
        self.automatic_optimization = False
        check_sampling(sampling)
        check_pairs(loss, groups, update)
        self.policy_spec, self.reward, self.loss, self.groups = as_spec(policy), reward, loss, groups
        self.sampling, self.update, self.optimizer_factory, self.schedule = sampling, update, optimizer, schedule
        self.all_sum = partial(all_sum, self)
        self.scorer = GuardedReward(reward, update.reward_failures, self.all_sum, partial(trainer_state, self))
        self.guard = StepGuard()
        self.iterations, self.plan = check_iterations(iterations), RunPlan()
        self.rates: list[float] = []  # of the last optimizer step, by parameter group
        self.engine = engine_for(sampling)
        self.model_path = self.policy_spec.path
        self.policy: PolicyNetwork | None = None
        self.reference: Frozen | None = None
        self.iteration = self.episodes = self.without_signal = 0
        self.order = torch.Generator().manual_seed(torch.initial_seed())
        self.update_means, self.eval_means = update_means(), Means(EVALUATION)
        self.last_rollout: tuple[Responses, Tensor] | None = None

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = reads(PromptBatch)
    configure_callbacks = refuse_trainer_steps

    def configure_model(self) -> None:
        """Load the policy, and its reference where the loss compares with one, once."""
        prepare_precision(self)
        if self.policy is not None:
            return
        self.tokenizer = training_tokenizer(self, self.policy_spec.path)
        self.policy = PolicyNetwork(load_causal_lm(self.policy_spec, self.tokenizer))
        if self.loss.needs_reference:
            self.reference = policy_as_it_starts(self.policy, self.policy_spec, self.tokenizer, self.policy)
        check_context(self, self.policy.network, self.sampling.max_new_tokens)
        shard_if_asked(self, self.policy)
        if self.reference is not None:
            shard_if_asked(self, self.reference.own_network)

    def on_fit_start(self) -> None:
        begin(self)
        self._place()

    def on_train_start(self) -> None:
        end_after_last(self)

    def _place(self) -> None:
        assert self.policy is not None
        place(self, self.policy)

    def on_validation_start(self) -> None:
        if not self.trainer.training and not self.trainer.sanity_checking:
            self._place()

    on_test_start = on_predict_start = on_validation_start

    # ---------------------------------------------------------------- one iteration

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        try:
            rollout = self._collect(batch)
        except IterationSkipped:
            log_training(self, self.scorer.metrics(), progress=())
            return
        assert self.policy is not None
        assert self.last_rollout is not None
        rollout = measured(self, self.policy, rollout, self.last_rollout[0].drawn, weigh=False)
        self._learn(self._paired(rollout))
        self._finish(rollout)

    def _collect(self, batch: PromptBatch) -> Rollout:
        responses = self._generate(repeated(batch, self.groups.size), self.sampling)
        scores = scores_of(self.scorer.during(self.iteration + 1), responses)
        self.last_rollout = responses, scores
        return self._score(responses, scores)

    def _generate(self, batch: PromptBatch, sampling: SamplingParameters) -> Responses:
        assert self.policy is not None
        return respond(self, self.policy, self.policy.network, batch, sampling)

    def _score(self, responses: Responses, scores: Tensor) -> Rollout:
        assert self.policy is not None
        return score_responses(
            responses,
            partial(policy_alone, self),
            self.reference,
            scores,
            temperature=self.sampling.temperature,
            micro_batch_size=self.update.micro_batch_size,
            most=fewest(self, self.update.micro_batch_size, len(responses.truncated)),
            keep_logprobs=old_logprobs_of(self, self.policy) == "sampled",
            share_prompts=computes_in_half(self, self.policy),  # as the policy does
            group_size=self.groups.size,
        )

    def _scored(self, ids: Tensor, attention: Tensor, mask: Tensor) -> PolicyOutput:
        assert self.policy is not None
        return self.policy(ids, attention, mask, temperature=self.sampling.temperature, share_prompts=True)

    def _ranked(self, rollout: Rollout) -> Tensor:
        """The scores that pairs are chosen by: what has no end is below all that has one. Shape (groups, size)."""
        return torch.where(rollout.truncated, -torch.inf, rollout.scores).view(-1, self.groups.size)

    def _paired(self, rollout: Rollout) -> Rollout:
        """The best response of each group, then its worst; the advantage of a pair that teaches is 1, that of a tie 0."""
        ranks = self._ranked(rollout)
        first = torch.arange(len(ranks), device=ranks.device) * self.groups.size
        rows = torch.stack([first + ranks.argmax(1), first + ranks.argmin(1)], dim=1).flatten()
        differ = (ranks.amax(1) > ranks.amin(1)).float().repeat_interleave(2)
        pairs = rollout.rows(rows)
        return pairs.with_advantages(differ[:, None].expand(pairs.response_mask.shape), pairs.returns)

    # ---------------------------------------------------------------- the update

    def _learn(self, pairs: Rollout) -> None:
        """Epochs of minibatches."""
        assert self.policy is not None
        drawn = self.last_rollout[0].drawn if self.last_rollout else None
        # Until the first step.
        same_weights = drawn is not None and engine_gave_old_logprobs(self, self.policy, drawn)
        for _ in range(self.update.epochs):
            most = fewest(self, self.update.minibatch_size, len(pairs))
            for minibatch in pairs.minibatches(self.update.minibatch_size, self.order, most, together=2):
                self._step(minibatch, same_weights)
                same_weights = False

    def _step(self, minibatch: Rollout, same_weights: bool = False) -> None:
        """One optimizer step on the mean over the pairs that teach, all ranks together; without gradient where all tie.

        ``same_weights``: none has been taken since the rollout, so that the engine's log-probabilities can be checked.
        """
        self.optimizers().zero_grad()  # type: ignore[union-attr]
        teaching = self.all_sum(minibatch.advantages[::2, 0].sum())
        most = fewest(self, self.update.micro_batch_size, len(minibatch))
        for micro in minibatch.micro_batches(self.update.micro_batch_size, most):
            loss = self._micro_loss(micro, same_weights) / teaching.clamp(min=1)
            # DDP averages gradients over ranks: times the world size makes it a sum, over all ranks' pairs.
            loss = with_router_loss(self, loss * self.trainer.world_size, share=1 / most)
            self.manual_backward(self.guard.saw(micro, loss))
        clipped_step(self, self.update.max_grad_norm)

    def _micro_loss(self, rows: Rollout, same_weights: bool = False) -> Tensor:
        """Loss summed over the pairs that teach."""
        width, twins = rows.response_mask.shape[1], torch.arange(len(rows)).view(-1, 2).T.flatten()
        logprobs = self._scored(rows.input_ids, rows.attention_mask, rows.sequence_mask).logprobs[:, -width:]
        if same_weights:
            self.update_means.update(mismatch.differences(logprobs, rows.logprobs, rows.response_mask))
            mismatch.refuse_other_numbers(logprobs, rows.logprobs, rows.response_mask)
        responses = ScoredResponses(logprobs, rows.response_mask, self._reference_logprobs(rows))
        pairs, teaches = Pairs(responses).rows(twins.to(logprobs.device)), rows.advantages[::2, 0]
        loss, implied = self.loss.pairs(pairs), self.loss.rewards(pairs.responses).detach()
        (chosen, rejected), (chosen_logps, rejected_logps) = implied.chunk(2), pairs.logps
        of_pairs = {
            "loss": loss,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "logps/chosen": chosen_logps,
            "logps/rejected": rejected_logps,
            "objective/scores_margin": rows.scores[::2] - rows.scores[1::2],
        }
        count = teaches.sum()
        self.update_means.update({name: ((teaches * x).sum(), count) for name, x in of_pairs.items()})
        return (teaches * loss).sum()

    def _reference_logprobs(self, rows: Rollout) -> Tensor | None:
        """The reference's, from the rollout; in half precision of these rows, which round differently in another batch."""
        assert self.policy is not None
        if self.reference is None or not self.loss.needs_reference:
            return None
        if not computes_in_half(self, self.policy):
            return rows.ref_logprobs
        inputs = rows.input_ids, rows.attention_mask, rows.sequence_mask
        output = self.reference(*inputs, temperature=self.sampling.temperature, share_prompts=True)
        return output.logprobs[:, -rows.response_mask.shape[1] :]

    def _finish(self, rollout: Rollout) -> None:
        """Schedules, counters and the log."""
        means = rollout_means(rollout, self.loss.reward_scale if self.loss.needs_reference else 0.0, self.all_sum)
        if self.reference is None:  # the rollout holds the policy's own numbers in its place
            means = {name: x for name, x in means.items() if name not in OF_REFERENCE}
        means["val/contain_eos_token"] = means.pop("val/num_eos_tokens")
        ranks = self._ranked(rollout)
        tied = (ranks.amax(1) == ranks.amin(1)).float()
        groups = self.all_sum(torch.tensor(float(len(ranks)), dtype=torch.float32, device=self.device))
        means["frac_reward_zero_std"] = self.all_sum(tied.sum()) / groups
        means |= part_means(self.reward.parts(), self.all_sum, self.device)
        self.iteration += 1
        self.episodes += int(means.pop("episodes"))
        if float(means["frac_reward_zero_std"]) == 1:
            count_without_signal(self, "all responses to each prompt", "groups/iterations_without_signal")
        log_iteration(
            self,
            {
                **means,
                **self.update_means.drain(),
                **self.scorer.metrics(),
                "groups/iterations_without_signal": float(self.without_signal),
                "learning_rate": self.rates[0],
                "episode": self.episodes,
                "iteration": self.iteration,
            },
            progress=("objective/scores", "objective/kl", "rewards/margins"),
        )
        advance_schedule(self, "iteration")
        end_after_last(self)

    def on_train_epoch_end(self) -> None:
        advance_schedule(self, "epoch")

    def show(self, batch: PromptBatch, count: int) -> list[Sample]:
        """Responses of the last iteration with their rewards."""
        return as_samples(*self.last_rollout, count) if self.last_rollout else []

    # ---------------------------------------------------------------- validation

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[Sample]:
        responses = self._generate(batch, self.sampling)
        return as_samples(responses, scores_of(self.scorer, responses), len(batch.prompts))

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        answer_fixed_prompts(self, batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        log_fixed_prompts(self)

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    # ---------------------------------------------------------------- optimizer and state

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self, trained_parameters(self))
        self.plan = plan_run(self, self._steps_of)
        return planned_schedule(self, optimizer)

    def _steps_of(self, prompts: int) -> int:
        """Optimizer steps of an iteration on this number of prompts, with one pair each."""
        return self.update.epochs * math.ceil(2 * prompts / self.update.minibatch_size)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["online_dpo"] = {
            "iteration": self.iteration,
            "episodes": self.episodes,
            "without_signal": self.without_signal,
            "order": over_ranks(self.trainer, self.order.get_state()),
            "reward": self.scorer.state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["online_dpo"]
        self.iteration, self.episodes = state["iteration"], state["episodes"]
        self.without_signal = state.get("without_signal", 0)
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.order.set_state(of_this_rank(self.trainer, state["order"]))
        self.scorer.load_state(state["reward"])


def check_pairs(loss: PairLoss, groups: Groups, update: GRPOUpdate) -> None:
    """Make sure that there are pairs, and that the loss can be given what it needs.

    Raises:
        UserError: If not; names the key.
    """
    require_interface("loss", loss, PairLoss)
    if groups.size < 2:
        raise UserError(f"groups.size {groups.size} makes no pair; set it to 2 or more")
    if groups.prompts is not None or groups.mask_truncated:
        raise UserError("groups.prompts and groups.mask_truncated are GRPO's; leave them out for online DPO")
    if update.minibatch_size % 2 or update.micro_batch_size % 2:
        raise UserError("update.minibatch_size and update.micro_batch_size count responses, two a pair: make them even")
    if update.importance != mismatch.Importance():
        raise UserError("update.importance weighs advantages, and online DPO has none; leave it out")
    if update.target_kl is not None:
        raise UserError("update.target_kl stops passes of GRPO; leave it out for online DPO")
    if (Needs.WHOLE_STEP | Needs.COLLISIONS) & loss.needs:
        raise UserError(
            f"{type(loss).__name__} has no online form here: it reads more than log-probabilities of a pair"
        )
