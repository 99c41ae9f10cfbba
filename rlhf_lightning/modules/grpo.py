"""Learning from groups of responses, without a critic: GRPO and its relatives, RLOO, REINFORCE++, ReMax."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.functional.aggregation import Counts, counts, token_weights
from rlhf_lightning.functional.kl import kl_k2
from rlhf_lightning.functional.masked import masked_sum
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.generation.native import engine_for
from rlhf_lightning.losses import PolicyObjective
from rlhf_lightning.losses.checks import require_interface
from rlhf_lightning.models.frozen import Frozen, policy_as_it_starts
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.policy import PolicyNetwork, PolicyOutput
from rlhf_lightning.models.spec import Model, as_spec
from rlhf_lightning.modules.batch_checks import reads
from rlhf_lightning.modules.group_metrics import group_means, length_extremes, update_means
from rlhf_lightning.modules.grpo_update import Groups, GRPOUpdate, check_groups
from rlhf_lightning.modules.guard import StepGuard, with_router_loss
from rlhf_lightning.modules.half_precision import prepare_precision
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
    first_micro_batches,
    least,
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
from rlhf_lightning.modules.rollout_metrics import EVALUATION, part_means
from rlhf_lightning.modules.showing import Sample, as_samples
from rlhf_lightning.rewards.failures import GuardedReward, IterationSkipped
from rlhf_lightning.rewards.reward import Reward
from rlhf_lightning.rollouts.buffer import Rollout
from rlhf_lightning.rollouts.collect import Responses, score_responses
from rlhf_lightning.rollouts.group_advantages import CriticFree
from rlhf_lightning.rollouts.groups import Drawn, draw_groups, prompts_of
from rlhf_lightning.rollouts.kl_control import KLControl
from rlhf_lightning.rollouts.mismatch import differences, refuse_other_numbers


class GRPOModule(LightningModule):
    """One ``training_step`` is one iteration: groups of responses, advantages, epochs of minibatches.

    Which method it is, three choices say: ``advantages`` (what a response is held against), ``objective.loss`` (what bounds a
    step) and ``objective.aggregation`` (what a token weighs); the table of methods in the README names them.
    Source: Shao et al. 2024 (https://arxiv.org/abs/2402.03300), Ahmadian et al. 2024 (https://arxiv.org/abs/2402.14740).
    """

    def __init__(
        self,
        policy: Model,
        reward: Reward,
        advantages: CriticFree,
        objective: PolicyObjective,
        kl: KLControl,
        groups: Groups = Groups(),  # noqa: B008  (frozen)
        sampling: SamplingParameters = SamplingParameters(),  # noqa: B008  (frozen)
        update: GRPOUpdate = GRPOUpdate(),  # noqa: B008  (frozen)
        optimizer: OptimizerFactory = lambda params: torch.optim.AdamW(params, lr=1e-6),
        schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
        iterations: int | None = None,
    ) -> None:
        """Remember what to build; networks are built in ``configure_model``.

        Args:
            policy: The model to align; as it starts it is also the reference.
            reward: Scores responses.
            advantages: From scores to advantages.
            objective: The loss, where the KL stands in it, and what a token weighs.
            kl: The weight of the KL; a constant 0 leaves the reference out of memory.
            groups: How many responses to a prompt.
            sampling: How responses are drawn, in training and in validation.
            update: Epochs, minibatches, clipping.
            optimizer: Makes the optimizer.
            schedule: Of the learning rate, in iterations unless ``interval`` says otherwise.
            iterations: Rollouts with their updates until the run ends, over as many epochs as that takes; None where
                ``trainer.max_epochs`` or ``trainer.max_steps`` (optimizer steps, of which an iteration has many) ends it.
        """
        super().__init__()
        self.automatic_optimization = False
        check_sampling(sampling)
        check_groups(groups, advantages, update)
        require_interface("kl", kl, KLControl)
        self.policy_spec, self.reward, self.advantages, self.objective = as_spec(policy), reward, advantages, objective
        self.kl, self.groups, self.sampling, self.update = kl, groups, sampling, update
        self.optimizer_factory, self.schedule = optimizer, schedule
        self.all_sum = partial(all_sum, self)
        self.scorer = GuardedReward(reward, update.reward_failures, self.all_sum, partial(trainer_state, self))
        self.guard = StepGuard()
        self.iterations, self.plan = check_iterations(iterations), RunPlan()
        self.rates: list[float] = []  # of the last optimizer step, by parameter group
        self.engine, self.model_path = engine_for(sampling), self.policy_spec.path
        self.policy: PolicyNetwork | None = None
        self.reference: Frozen | None = None
        self.iteration = self.episodes = self.tokens = self.without_signal = 0
        self.order = torch.Generator().manual_seed(torch.initial_seed())
        self.update_means, self.eval_means = update_means(), Means(EVALUATION)
        self.drawn: Drawn | None = None  # the last iteration's
        self.parts: dict[str, Tensor] = {}  # scores of each part of the reward for all that was drawn in it

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = reads(PromptBatch)
    configure_callbacks = refuse_trainer_steps

    def configure_model(self) -> None:
        """Load the policy, and its reference where the KL has a weight, once."""
        prepare_precision(self)
        if self.policy is not None:
            return
        self.tokenizer = training_tokenizer(self, self.policy_spec.path)
        self.policy = PolicyNetwork(load_causal_lm(self.policy_spec, self.tokenizer))
        if self.kl.coef > 0:
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
        in_reward = self.kl.coef if self.objective.kl_placement == "reward_k1" else 0.0
        rollout = self.advantages.estimate(rollout, kl_coef=in_reward, all_sum=self.all_sum)
        assert self.drawn is not None
        assert self.policy is not None
        rollout = measured(self, self.policy, rollout, self.drawn.responses.drawn)
        stopped = self._learn(rollout)
        self._finish(rollout, stopped)

    def _collect(self, batch: PromptBatch) -> Rollout:
        reward = self.scorer.during(self.iteration + 1)
        parts: dict[str, list[Tensor]] = {}

        def draw(prompts: PromptBatch) -> tuple[Responses, Tensor]:
            responses = self._generate(prompts, self.sampling)
            scores = scores_of(reward, responses)
            for name, part in self.reward.parts().items():
                parts.setdefault(name, []).append(part)
            return responses, scores

        size, wanted = self.groups.size, self.groups.prompts
        self.drawn = drawn = draw_groups(batch, size, wanted, draw, partial(least, self), self._judged)
        self.parts = {name: torch.cat(scores) for name, scores in parts.items()}
        assert self.policy is not None
        batches = first_micro_batches(self, self.policy, len(drawn.scores), self.groups.size)
        rollout = self._score(drawn.responses, drawn.scores, batches)
        return self._with_greedy(rollout, drawn, reward) if self.advantages.needs_greedy else rollout

    def _judged(self, scores: Tensor, truncated: Tensor) -> Tensor:
        """The scores that advantages are made of; equal in a group of which every response is masked. Shape (responses,)."""
        scores = self.advantages.processed(scores, truncated)
        if not self.groups.mask_truncated:
            return scores
        nothing_left = truncated.view(-1, self.groups.size).all(1).repeat_interleave(self.groups.size)
        return scores.masked_fill(nothing_left, 0)

    def _with_greedy(self, rollout: Rollout, drawn: Drawn, reward: Reward) -> Rollout:
        """With the processed score of each prompt's most likely response."""
        greedy = self._generate(prompts_of(drawn.responses, self.groups.size), replace(self.sampling, temperature=0))
        scores = self.advantages.processed(scores_of(reward, greedy).to(self.device), greedy.truncated)
        return replace(rollout, baselines=scores.repeat_interleave(self.groups.size))

    def _generate(self, batch: PromptBatch, sampling: SamplingParameters) -> Responses:
        assert self.policy is not None
        return respond(self, self.policy, self.policy.network, batch, sampling)

    def _score(self, responses: Responses, scores: Tensor, batches: list[Tensor] | None = None) -> Rollout:
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
            batches=batches,
            share_prompts=batches is not None,  # as the policy does
            group_size=self.groups.size,
        )

    def _scored(self, ids: Tensor, attention: Tensor, mask: Tensor) -> PolicyOutput:
        assert self.policy is not None
        return self.policy(
            ids,
            attention,
            mask,
            temperature=self.sampling.temperature,
            entropy_gradient=self.objective.entropy_coef > 0,
            share_prompts=True,
        )

    # ---------------------------------------------------------------- the update

    def _learn(self, rollout: Rollout) -> bool:
        """Epochs of minibatches; True if the KL stopped them early."""
        taken = 0
        for _ in range(self.update.epochs):
            most = fewest(self, self.update.minibatch_size, len(rollout))
            for minibatch in rollout.minibatches(self.update.minibatch_size, self.order, most, self.groups.size):
                approx_kl = self._step(minibatch, taken)
                taken += 1
                if self.update.target_kl is not None and approx_kl > self.update.target_kl:
                    return True
        return False

    def _counted(self, rows: Rollout) -> Tensor:
        """True on the tokens that are learnt from. Shape (batch, length), bool."""
        return rows.response_mask & ~rows.truncated[:, None] if self.groups.mask_truncated else rows.response_mask

    def _step(self, minibatch: Rollout, taken: int) -> float:
        """One optimizer step over the minibatch, all ranks together; the approximate KL before it.

        Args:
            minibatch: Groups of the rollout.
            taken: Steps since it was sampled: how stale it is. At 0 the engine's log-probabilities can be checked.
        """
        self.optimizers().zero_grad()  # type: ignore[union-attr]
        total = Counts(*(self.all_sum(count) for count in counts(self._counted(minibatch))))
        log_ratio_squares = torch.zeros((), dtype=torch.float32, device=self.device)
        assert self.policy is not None
        checked = self.drawn is not None and engine_gave_old_logprobs(self, self.policy, self.drawn.responses.drawn)
        most = fewest(self, self.update.micro_batch_size, len(minibatch))
        for micro in minibatch.micro_batches(self.update.micro_batch_size, most):
            loss, squares = self._micro_loss(micro, total, taken == 0 and checked)
            # DDP averages gradients over ranks: times the world size makes it a sum, over all ranks' tokens.
            loss = with_router_loss(self, loss * self.trainer.world_size, share=1 / most)
            self.manual_backward(self.guard.saw(micro, loss))
            log_ratio_squares += squares
        clipped_step(self, self.update.max_grad_norm)
        self.update_means.update({"staleness": (torch.tensor(float(taken * len(minibatch))), len(minibatch))})
        return float(self.all_sum(log_ratio_squares) / total.tokens.clamp(min=1))

    def _micro_loss(self, rows: Rollout, total: Counts, same_weights: bool) -> tuple[Tensor, Tensor]:
        """These rows' share in the loss of the step, and their summed k2 to the policy that sampled."""
        mask, width = self._counted(rows), rows.response_mask.shape[1]
        output = self._scored(rows.input_ids, rows.attention_mask, rows.sequence_mask)
        logprobs, entropy = (x[:, -width:] for x in (output.logprobs, output.entropy))
        if same_weights:
            self.update_means.update(differences(logprobs, rows.logprobs, rows.response_mask))
            refuse_other_numbers(logprobs, rows.logprobs, rows.response_mask)
        loss, low, high = self.objective.loss.tokens(logprobs, rows.logprobs, rows.advantages, mask)
        kl = self.kl.coef * self.objective.kl_tokens(logprobs - rows.ref_logprobs, mask)
        weights = token_weights(mask, how=self.objective.aggregation, total=total, longest=self.sampling.max_new_tokens)
        policy, divergence, bonus = (masked_sum(weights * x, mask) for x in (loss, kl, entropy))
        log_ratio = (logprobs - rows.logprobs).detach()
        squares = masked_sum(kl_k2(log_ratio), mask)
        tokens = mask.sum()
        per_token = {
            "entropy": masked_sum(entropy, mask),
            "clip_ratio/low_mean": low.sum(),
            "clip_ratio/high_mean": high.sum(),
            "clip_ratio/region_mean": (low | high).sum(),
            "policy/approxkl_avg": squares,
            "val/ratio": masked_sum(log_ratio.exp(), mask),
        }
        share = tokens / total.tokens.clamp(min=1)  # of the step, so that a mean over steps comes out
        per_step = {"policy_loss": policy, "kl_loss": divergence}
        self.update_means.update({name: (x, tokens) for name, x in per_token.items()})
        self.update_means.update({name: (x, share) for name, x in per_step.items()})
        return policy + divergence - self.objective.entropy_coef * bonus, squares

    def _finish(self, rollout: Rollout, stopped: bool) -> None:
        """Schedules, counters, KL control and the log."""
        assert self.drawn is not None
        judged = self._judged(rollout.scores, rollout.truncated)
        means = group_means(rollout, judged, self.all_sum, reference=self.reference is not None)
        means |= part_means(self.parts, self.all_sum, self.device)
        self.iteration += 1
        self.episodes += int(means.pop("episodes"))
        self.tokens += int(self.all_sum(rollout.attention_mask.sum()))
        if float(means["frac_reward_zero_std"]) == 1 and self.groups.size > 1:
            count_without_signal(self, "all responses to each prompt", "groups/iterations_without_signal")
        log_iteration(
            self,
            {
                **means,
                **length_extremes(rollout, self),
                **self.update_means.drain(),
                **self.scorer.metrics(),
                "groups/drawn": float(self.all_sum(torch.tensor(self.drawn.prompts, device=self.device))),
                "groups/iterations_without_signal": float(self.without_signal),
                "kl_coef": self.kl.coef,
                "learning_rate": self.rates[0],
                "num_tokens": float(self.tokens),
                "episode": self.episodes,
                "iteration": self.iteration,
                "early_stop": float(stopped),
            },
            progress=("reward", "objective/kl", "completions/mean_length"),
        )
        if self.reference is not None:
            rows = self.all_sum(torch.tensor(len(rollout), device=self.device))
            self.kl.update(float(means["objective/kl"]), int(rows))
        advance_schedule(self, "iteration")
        end_after_last(self)

    def on_train_epoch_end(self) -> None:
        advance_schedule(self, "epoch")

    def show(self, batch: PromptBatch, count: int) -> list[Sample]:
        """Responses of the last iteration with their rewards."""
        return as_samples(self.drawn.responses, self.drawn.scores, count) if self.drawn else []

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
        """Optimizer steps of an iteration on this number of prompts, unless the KL stops it."""
        responses = min(self.groups.prompts or prompts, prompts) * self.groups.size
        return self.update.epochs * math.ceil(responses / self.update.minibatch_size)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["grpo"] = {
            "iteration": self.iteration,
            "episodes": self.episodes,
            "tokens": self.tokens,
            "without_signal": self.without_signal,
            "kl": self.kl.state(),
            "order": over_ranks(self.trainer, self.order.get_state()),
            "reward": self.scorer.state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["grpo"]
        self.iteration, self.episodes = state["iteration"], state["episodes"]
        self.tokens, self.without_signal = state["tokens"], state["without_signal"]
        self.kl.load_state(state["kl"])
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.order.set_state(of_this_rank(self.trainer, state["order"]))
        self.scorer.load_state(state["reward"])
