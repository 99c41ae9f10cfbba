"""Proximal policy optimisation from a reward: the third stage of classic RLHF."""

import math
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from rlhf_lightning.batches import PromptBatch, SequenceBatch
from rlhf_lightning.functional.kl import kl_k2
from rlhf_lightning.functional.masked import masked_sum
from rlhf_lightning.functional.value import explained_variance
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.generation.native import engine_for
from rlhf_lightning.losses import PPOLoss
from rlhf_lightning.losses.checks import require_interface
from rlhf_lightning.models.actor_critic import ActorCritic
from rlhf_lightning.models.frozen import policy_as_it_starts
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.shared_critic import load_critic
from rlhf_lightning.models.spec import Model, as_spec
from rlhf_lightning.modules.batch_checks import reads
from rlhf_lightning.modules.guard import StepGuard, with_router_loss
from rlhf_lightning.modules.half_precision import prepare_precision
from rlhf_lightning.modules.handoff import check_context, shard_if_asked, training_tokenizer
from rlhf_lightning.modules.master_weights import build_optimizer
from rlhf_lightning.modules.metrics import Means, log_training
from rlhf_lightning.modules.online import (
    all_equal,
    all_sum,
    answer_fixed_prompts,
    begin,
    check_sampling,
    clipped_step,
    count_without_signal,
    engine_gave_old_logprobs,
    fewest,
    first_micro_batches,
    log_fixed_prompts,
    log_iteration,
    measured,
    old_logprobs_of,
    place,
    refuse_trainer_steps,
    respond,
    scores_of,
    trainer_state,
)
from rlhf_lightning.modules.optimization import OptimizerFactory, Schedule
from rlhf_lightning.modules.plan import RunPlan, check_iterations, end_after_last, plan_run
from rlhf_lightning.modules.ppo_update import PPOUpdate
from rlhf_lightning.modules.pretraining_mix import add_pretraining, share, texts_of
from rlhf_lightning.modules.ranks import of_this_rank, over_ranks
from rlhf_lightning.modules.rollout_metrics import (
    EVALUATION,
    part_means,
    rollout_means,
    update_means,
    update_metrics,
)
from rlhf_lightning.modules.showing import Sample, as_samples
from rlhf_lightning.rewards.failures import GuardedReward, IterationSkipped
from rlhf_lightning.rewards.reward import Reward
from rlhf_lightning.rollouts.advantages import GAE, AdvantageEstimator
from rlhf_lightning.rollouts.buffer import Rollout
from rlhf_lightning.rollouts.collect import Responses, score_responses
from rlhf_lightning.rollouts.kl_control import FixedKL, KLControl
from rlhf_lightning.rollouts.mismatch import differences, refuse_other_numbers


class PPOModule(LightningModule):
    """One ``training_step`` is one iteration: collect, estimate advantages, epochs of minibatches.

    Source: Ouyang et al. 2022 (https://arxiv.org/abs/2203.02155), details after Huang et al. 2024
    (https://arxiv.org/abs/2403.17031).
    """

    def __init__(
        self,
        policy: Model,
        critic: Model | None,
        reward: Reward,
        kl: KLControl = FixedKL(),  # noqa: B008  (never mutated: AdaptiveKL is always the user's own)
        sampling: SamplingParameters = SamplingParameters(),  # noqa: B008  (frozen)
        loss: PPOLoss = PPOLoss(),  # noqa: B008  (frozen)
        advantages: AdvantageEstimator = GAE(),  # noqa: B008  (frozen)
        update: PPOUpdate = PPOUpdate(),  # noqa: B008  (frozen)
        optimizer: OptimizerFactory = lambda params: torch.optim.AdamW(params, lr=1e-6, eps=1e-5),
        schedule: Schedule = Schedule(),  # noqa: B008  (frozen)
        iterations: int | None = None,
    ) -> None:
        """Remember what to build; networks are built in ``configure_model``.

        Args:
            policy: The model to align; as it starts it is also the reference.
            critic: Where the critic starts: usually the reward model. None: a value head on the policy's own trunk.
            reward: Scores responses.
            kl: The weight of the KL penalty.
            sampling: How responses are drawn, in training and in validation.
            loss: The clipped losses.
            advantages: From scores to advantages.
            update: Epochs, minibatches, clipping.
            optimizer: Makes the one optimizer of policy and critic.
            schedule: Of the learning rates, in iterations.
            iterations: Rollouts with their updates until the run ends, over as many epochs as that takes; None where
                ``trainer.max_epochs`` or ``trainer.max_steps`` (optimizer steps, of which an iteration has many) ends it.
        """
        super().__init__()
        self.automatic_optimization = False
        check_sampling(sampling)
        require_interface("kl", kl, KLControl)
        require_interface("advantages", advantages, AdvantageEstimator)
        self.policy_spec, self.critic_spec, self.reward, self.kl = as_spec(policy), as_spec(critic), reward, kl
        self.sampling, self.loss, self.advantages, self.update = sampling, loss, advantages, update
        self.optimizer_factory, self.schedule = optimizer, schedule
        self.all_sum = partial(all_sum, self)
        self.scorer = GuardedReward(reward, update.reward_failures, self.all_sum, partial(trainer_state, self))
        self.guard = StepGuard()
        self.iterations, self.plan = check_iterations(iterations), RunPlan()
        self.engine = engine_for(sampling)
        self.model_path = self.policy_spec.path
        self.actor_critic: ActorCritic | None = None
        self.iteration = self.episodes = self.without_signal = 0
        self.order = torch.Generator().manual_seed(torch.initial_seed())
        self.update_means, self.eval_means = update_means(), Means(EVALUATION)
        self.last_rollout: tuple[Responses, Tensor] | None = None

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = reads(PromptBatch)
    configure_callbacks = refuse_trainer_steps

    def configure_model(self) -> None:
        """Load policy, critic and reference, once."""
        prepare_precision(self)
        if self.actor_critic is not None:
            return
        critic_path = self.critic_spec.path if self.critic_spec else None
        self.tokenizer = training_tokenizer(self, self.policy_spec.path, critic_path)
        policy = PolicyNetwork(load_causal_lm(self.policy_spec, self.tokenizer))
        critic = load_critic(self.critic_spec, self.policy_spec, policy, self.tokenizer) if self.critic_spec else None
        self.actor_critic = ActorCritic(policy, critic)
        self.reference = policy_as_it_starts(policy, self.policy_spec, self.tokenizer, self.actor_critic)
        check_context(self, policy.network, self.sampling.max_new_tokens)
        shard_if_asked(self, self.actor_critic)
        shard_if_asked(self, self.reference.own_network)

    def on_fit_start(self) -> None:
        begin(self)
        self._place()

    def on_train_start(self) -> None:
        end_after_last(self)

    def _place(self) -> None:
        assert self.actor_critic is not None
        place(self, self.actor_critic)

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
        rollout = self.advantages.estimate(rollout, kl_coef=self.kl.coef, all_sum=self.all_sum)
        assert self.last_rollout is not None
        assert self.actor_critic is not None
        rollout = measured(self, self.actor_critic.policy, rollout, self.last_rollout[0].drawn)
        stopped = self._learn(rollout, texts_of(batch, self.loss.ptx_coef))
        self._finish(rollout, stopped)

    def _collect(self, batch: PromptBatch) -> Rollout:
        responses = self._generate(batch, self.sampling)
        scores = scores_of(self.scorer.during(self.iteration + 1), responses)
        self.last_rollout = responses, scores
        assert self.actor_critic is not None
        return self._score(
            responses, scores, first_micro_batches(self, self.actor_critic.policy, len(responses.truncated))
        )

    def _generate(self, batch: PromptBatch, sampling: SamplingParameters) -> Responses:
        assert self.actor_critic is not None
        return respond(self, self.actor_critic, self.actor_critic.policy.network, batch, sampling)

    def _score(self, responses: Responses, scores: Tensor, batches: list[Tensor] | None = None) -> Rollout:
        assert self.actor_critic is not None
        return score_responses(
            responses,
            self.actor_critic,
            self.reference,
            scores,
            temperature=self.sampling.temperature,
            micro_batch_size=self.update.micro_batch_size,
            most=fewest(self, self.update.micro_batch_size, len(responses.truncated)),
            keep_logprobs=old_logprobs_of(self, self.actor_critic.policy) == "sampled",
            batches=batches,
        )

    def _learn(self, rollout: Rollout, texts: SequenceBatch | None = None) -> bool:
        """Epochs of minibatches, each with its share of the texts; True if the KL stopped them early."""
        assert self.actor_critic is not None
        drawn = self.last_rollout[0].drawn if self.last_rollout else None
        # Until the first step.
        same_weights = drawn is not None and engine_gave_old_logprobs(self, self.actor_critic.policy, drawn)
        most = fewest(self, self.update.minibatch_size, len(rollout))
        for _ in range(self.update.epochs):
            minibatches = rollout.minibatches(self.update.minibatch_size, self.order, most)
            for number, minibatch in enumerate(minibatches):
                approx_kl = self._step(minibatch, same_weights, share(texts, number, most) if texts else None)
                same_weights = False
                if self.update.target_kl is not None and approx_kl > self.update.target_kl:
                    return True
        return False

    def _step(self, minibatch: Rollout, same_weights: bool, texts: SequenceBatch | None = None) -> float:
        """One optimizer step on the token mean over the minibatch, all ranks together; the approximate KL before it.

        ``same_weights``: none has been taken since the rollout, so that the engine's log-probabilities can be checked.
        """
        self.optimizers().zero_grad()  # type: ignore[union-attr]
        tokens = self.all_sum(minibatch.response_mask.sum())
        log_ratio_squares = torch.zeros((), dtype=torch.float32, device=self.device)
        most = fewest(self, self.update.micro_batch_size, len(minibatch))
        for micro in minibatch.micro_batches(self.update.micro_batch_size, most):
            loss, squares = self._micro_loss(micro, same_weights)
            # DDP averages gradients over ranks: times the world size makes it a sum, over all ranks' tokens.
            loss = with_router_loss(self, loss * self.trainer.world_size / tokens, share=1 / most)
            self.manual_backward(self.guard.saw(micro, loss))
            log_ratio_squares += squares
        if texts is not None:
            add_pretraining(self, texts)
        assert self.actor_critic is not None
        policy, critic = (group["params"] for group in self.actor_critic.parameter_groups(None))
        clipped_step(self, self.update.max_grad_norm, {"policy": policy, "critic": critic})
        return float(self.all_sum(log_ratio_squares) / tokens)

    def _micro_loss(self, rows: Rollout, same_weights: bool = False) -> tuple[Tensor, Tensor]:
        """PPO's loss summed over the response tokens, and the summed k2 to the policy that sampled."""
        assert self.actor_critic is not None
        mask, width = rows.response_mask, rows.response_mask.shape[1]
        output = self.actor_critic(
            rows.input_ids,
            rows.attention_mask,
            rows.sequence_mask,
            temperature=self.sampling.temperature,
            entropy_gradient=self.loss.entropy_coef > 0,
        )
        logprobs, values, entropy = (x[:, -width:] for x in (output.logprobs, output.values, output.entropy))
        if same_weights:
            self.update_means.update(differences(logprobs, rows.logprobs, mask))
            refuse_other_numbers(logprobs, rows.logprobs, mask)
        policy, policy_clipped = self.loss.policy(logprobs, rows.logprobs, rows.advantages, mask)
        value, value_clipped = self.loss.value(values, rows.values, rows.returns, mask)
        log_ratio = (logprobs - rows.logprobs).detach().masked_fill(~mask, 0)
        squares, ratio, tokens = kl_k2(log_ratio).sum(), log_ratio.exp(), mask.sum()
        counted = {
            "policy/approxkl_avg": squares,
            "policy/clipfrac_avg": policy_clipped,
            "policy/entropy_avg": masked_sum(entropy, mask),
            "loss/policy_avg": policy,
            "loss/value_avg": value,
            "val/clipfrac_avg": value_clipped,
            "val/ratio": masked_sum(ratio, mask),
            "val/ratio_spread": masked_sum((ratio - 1).square(), mask),
        }
        self.update_means.update({name: (total, tokens) for name, total in counted.items()})
        return self.loss.total(policy, value, entropy, mask), squares

    def _finish(self, rollout: Rollout, stopped: bool) -> None:
        """Schedules, counters, KL control and the log."""
        scheduler: Any = self.lr_schedulers()
        means = rollout_means(rollout, self.kl.coef, self.all_sum)
        means |= part_means(self.reward.parts(), self.all_sum, self.device)
        updates, rates = update_metrics(self.update_means), scheduler.get_last_lr()
        self.iteration += 1
        self.episodes += (responses := int(means.pop("episodes")))
        if all_equal(self, self.advantages.processed(rollout.scores, rollout.truncated)) and responses > 1:
            count_without_signal(self, "all responses", "rewards/iterations_without_signal")
        log_iteration(
            self,
            {
                **means,
                **updates,
                **self.scorer.metrics(),
                "rewards/iterations_without_signal": float(self.without_signal),
                "val/explained_variance": explained_variance(
                    rollout.values, rollout.returns, rollout.response_mask, all_sum=self.all_sum
                ),
                "kl_coef": self.kl.coef,
                "lr": rates[0],
                "critic_lr": rates[-1],
                "eps": self.loss.clip_range,
                "episode": self.episodes,
                "iteration": self.iteration,
                "early_stop": float(stopped),
            },
            progress=("objective/scores", "objective/kl", "objective/length"),
        )
        self.kl.update(float(means["objective/kl"]), int(self.all_sum(torch.tensor(len(rollout), device=self.device))))
        scheduler.step()
        end_after_last(self)

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
        assert self.actor_critic is not None
        optimizer = build_optimizer(self, self.actor_critic.parameter_groups(self.update.critic_lr))
        self.plan = plan_run(self, self._steps_of)
        return [optimizer], [self.schedule.attach(optimizer, self.plan.iterations)]

    def _steps_of(self, prompts: int) -> int:
        """Optimizer steps of an iteration on this number of prompts, unless the KL stops it."""
        return self.update.epochs * math.ceil(prompts / self.update.minibatch_size)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["ppo"] = {
            "iteration": self.iteration,
            "episodes": self.episodes,
            "without_signal": self.without_signal,
            "kl": self.kl.state(),
            "order": over_ranks(self.trainer, self.order.get_state()),
            "reward": self.scorer.state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["ppo"]
        self.iteration, self.episodes = state["iteration"], state["episodes"]
        self.without_signal = state.get("without_signal", 0)
        self.kl.load_state(state["kl"])
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.order.set_state(of_this_rank(self.trainer, state["order"]))
        self.scorer.load_state(state["reward"])
