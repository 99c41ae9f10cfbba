"""What the methods that sample share, as functions of the module: PPO, GRPO and its relatives, online DPO."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.data.seeds import mixed_seed
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import Generation, SamplingParameters
from rlhf_lightning.models.actor_critic import ActorCriticOutput
from rlhf_lightning.models.sharding import gathered, wake
from rlhf_lightning.modules.half_precision import computes_in_half, place_reference
from rlhf_lightning.modules.handoff import sharing_if_asked
from rlhf_lightning.modules.metrics import log_evaluation, log_training
from rlhf_lightning.modules.optimization import advance_schedule, norm_of, whole
from rlhf_lightning.modules.ranks import over_ranks
from rlhf_lightning.modules.rollout_metrics import evaluation_counts
from rlhf_lightning.rewards.reward import Reward, checked_scores
from rlhf_lightning.rollouts.buffer import Rollout, parts, shuffled
from rlhf_lightning.rollouts.collect import Responses, generate_responses
from rlhf_lightning.rollouts.mismatch import OldLogprobs, compared, gives_old_logprobs, old_logprobs_from

if TYPE_CHECKING:
    from transformers import TrainerState

log = logging.getLogger(__name__)


def check_sampling(sampling: SamplingParameters) -> None:
    """Make sure that what is learnt from is drawn from the policy itself.

    Raises:
        UserError: If it is not.
    """
    if sampling.departures:
        raise UserError(
            "learning from samples needs the log-probabilities of the distribution that was sampled, and these settings of "
            f"sampling change it: {', '.join(sampling.departures)}; leave them out (temperature must be above 0)"
        )


def begin(module: Any) -> None:
    """At the start of a training: ranks draw different responses.

    Raises:
        UserError: In float16, whose scaled gradients a module can't clip itself.
    """
    if str(module.trainer.precision).startswith("16"):
        raise UserError(
            f"{type(module).__name__} clips its own gradients and can't unscale float16 ones; "
            "use precision bf16-mixed or 32-true"
        )
    if module.trainer.world_size > 1:
        torch.manual_seed(rank_seed(torch.initial_seed(), module.global_rank))


def refuse_trainer_steps(module: Any) -> list[Any]:
    """Lightning's hook ``configure_callbacks`` of a module that steps its optimizer itself: it adds none.

    It is the first hook of a run: Lightning's own refusal, which knows nothing of our keys, comes after it.

    Raises:
        UserError: If the Trainer is to clip or to accumulate gradients; names the keys that do it here.
    """
    trainer, name = module.trainer, type(module).__name__
    if trainer.gradient_clip_val:
        raise UserError(
            f"trainer.gradient_clip_val {trainer.gradient_clip_val:g}: {name} clips its gradients itself; remove the key and "
            f"set model.update.max_grad_norm to {trainer.gradient_clip_val:g} (it is {module.update.max_grad_norm:g})"
        )
    if trainer.accumulate_grad_batches != 1:
        raise UserError(
            f"trainer.accumulate_grad_batches {trainer.accumulate_grad_batches}: {name} takes its optimizer steps itself; "
            "remove the key. model.update.minibatch_size is the number of responses of an optimizer step (on one rank), "
            "model.update.micro_batch_size the number in memory at once, data.batch_size the number of prompts of an iteration"
        )
    return []


def rank_seed(seed: int, rank: int) -> int:
    """The seed of a rank: on the first the seed itself, as in a run on one rank."""
    return seed if rank == 0 else mixed_seed("rank", seed, rank)


def validation_seed(number: int, rank: int) -> int:
    """The seed of a validation batch: its index on the first rank, others on the others, which have other prompts."""
    return number if rank == 0 else mixed_seed("validation", number, rank)


def place(module: Any, root: nn.Module) -> None:
    """Bring what an iteration needs to the module's device: its own networks, the reference, the reward."""
    wake(root, module.device)
    place_reference(module, module.reference)
    with sharing_if_asked(module):
        module.scorer.prepare(module.device)


def policy_alone(
    module: Any, ids: Tensor, attention: Tensor, mask: Tensor, *, temperature: float, values_only: bool
) -> ActorCriticOutput:
    """A policy without a critic on a rollout's rows, as ``score_responses`` asks for it: the values are zeros.

    Args:
        module: Its ``_scored`` runs the policy, at the temperature of its sampling.
        ids: As in :class:`~rlhf_lightning.models.policy.PolicyNetwork`, like the next two.
        attention: Same.
        mask: Same.
        temperature: That of the module's sampling.
        values_only: What the policy says is known already: zeros, and no forward.
    """
    zeros = torch.zeros(mask[:, 1:].shape, dtype=torch.float32, device=mask.device)
    if values_only:
        return ActorCriticOutput(zeros, zeros, zeros)
    output = module._scored(ids, attention, mask)
    return ActorCriticOutput(output.logprobs, output.entropy, zeros)


def respond(
    module: Any, root: nn.Module, network: PreTrainedModel, batch: PromptBatch, sampling: SamplingParameters
) -> Responses:
    """Draw a response to every prompt of the batch with the module's engine.

    Args:
        module: Has ``engine`` and ``tokenizer``.
        root: What FSDP2 has sharded with the network in it; it is gathered once.
        network: The policy.
        batch: Prompts.
        sampling: How to draw.
    """
    with gathered(root):
        module.engine.take_weights(network, module.tokenizer, version=module.global_step)
        responses = generate_responses(batch, network, module.tokenizer, module.engine, sampling)
        module.engine.rest()
    return responses


def old_logprobs_of(module: Any, network: nn.Module) -> OldLogprobs:
    """Where the old log-probabilities of a module's updates come from.

    Args:
        module: Has ``engine`` and ``update``.
        network: The policy.
    """
    half = computes_in_half(module, network)
    return old_logprobs_from(module.engine, half=half, importance=module.update.importance)


def first_micro_batches(module: Any, network: nn.Module, rows: int, together: int = 1) -> list[Tensor] | None:
    """The micro-batches of the update's first pass over a rollout, in which half precision scores it.

    Args:
        module: Has ``update``, and ``order``, the generator that the update will shuffle with.
        network: The policy.
        rows: Of the rollout, on this rank.
        together: As in :meth:`~rlhf_lightning.rollouts.buffer.Rollout.minibatches`.

    Returns:
        Indices of rows; None in float32, where a forward of any rows gives the same numbers.
    """
    if not computes_in_half(module, network):
        return None
    ahead = torch.Generator()
    ahead.set_state(module.order.get_state())
    size, micro = module.update.minibatch_size, module.update.micro_batch_size
    order = shuffled(rows, ahead, together).to(module.device)
    minibatches = parts(order, size, fewest(module, size, rows))
    return [batch for index in minibatches for batch in parts(index, micro, fewest(module, micro, len(index)))]


def measured(module: Any, network: nn.Module, rollout: Rollout, drawn: Generation, *, weigh: bool = True) -> Rollout:
    """The rollout, weighed where its sampler's numbers are not the policy's; how far they are apart is counted.

    Args:
        module: Has ``engine``, ``update`` and ``update_means``.
        network: The policy.
        rollout: With advantages.
        drawn: What the engine gave.
        weigh: False for a method without advantages, where there is nothing to weigh.
    """
    if drawn.logprobs is None:
        warn_of_unmeasured(type(module.engine).__name__)
    source = old_logprobs_of(module, network)
    if source == "weighed" and not weigh:
        source = "scored"
    exact = module.engine.same_numbers and not computes_in_half(module, network)
    rollout, counted = compared(rollout, drawn, source, module.update.importance, exact=exact)
    if counted:
        module.update_means.update(counted)
    return rollout


@cache
def warn_of_unmeasured(engine: str) -> None:
    """Log, once, that an engine keeps what nobody can check to itself."""
    log.warning("%s gives no log-probabilities: whether it samples from the policy itself can't be measured", engine)


def engine_gave_old_logprobs(module: Any, network: nn.Module, drawn: Generation) -> bool:
    """Whether the first forward of an update can check the engine: the old log-probabilities are its own.

    Args:
        module: Has ``engine`` and ``update``.
        network: The policy.
        drawn: What the engine gave.
    """
    return gives_old_logprobs(drawn, old_logprobs_of(module, network))


def scores_of(reward: Reward, responses: Responses) -> Tensor:
    """The reward's verdict on responses, checked. Shape (batch,), float32."""
    with gathered(*reward.networks()):
        return checked_scores(reward, responses.samples)


def clipped_step(module: Any, max_grad_norm: float, parts: dict[str, list[Tensor]] | None = None) -> None:
    """Check the gradients, clip them, step; the norms before clipping are counted.

    Args:
        module: Has gradients, a ``guard`` and ``update_means``.
        max_grad_norm: Norm that the gradients of all parameters together are clipped to.
        parts: Parameters by name whose norms are counted too.
    """
    for name, parameters in (parts or {}).items():
        own = norm_of([p.grad for p in parameters if p.grad is not None])
        module.update_means.update({f"grad_norm/{name}": (own, 1)})
    norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    module.guard.check(module, whole(norm))
    module.guard.watch(whole(norm), max_grad_norm, module.global_step)
    torch.nn.utils.clip_grads_with_norm_(module.parameters(), max_grad_norm, norm)
    module.update_means.update({"grad_norm": (whole(norm), 1)})
    optimizer = module.optimizers()
    optimizer.step()
    module.rates = [float(group["lr"]) for group in optimizer.param_groups]
    advance_schedule(module, "step")


def answer_fixed_prompts(module: Any, batch: PromptBatch, number: int) -> None:
    """A validation: answer greedily, and sampled from a fixed seed: the training's random numbers are not touched.

    Args:
        module: Has ``sampling``, ``scorer``, ``eval_means``, and makes rollouts of responses.
        batch: Prompts.
        number: Of the batch, from which the seed follows.
    """
    modes = {"sampled": module.sampling, "greedy": replace(module.sampling, temperature=0)}
    module.scorer.logged_metrics()  # a skipped iteration's are not this validation's
    with torch.random.fork_rng(devices=[module.device] if module.device.type == "cuda" else []):
        torch.manual_seed(validation_seed(number, module.global_rank))
        for mode, sampling in modes.items():
            responses = module._generate(batch, sampling)
            rollout = module._score(responses, scores_of(module.scorer, responses))
            log_ratio = None if module.reference is None else rollout.logprobs - rollout.ref_logprobs
            module.eval_means.update(evaluation_counts(mode, responses, rollout.scores, log_ratio))
            for name, values in module.scorer.logged_metrics().items():
                module.scorer.validated.setdefault(f"{mode}/{name}", []).extend(values)


def log_fixed_prompts(module: Any) -> None:
    """Log what a validation counted, and what the reward logged itself."""
    logged, module.scorer.validated = module.scorer.validated, {}
    log_evaluation(module, module.eval_means, **logged_means(module, logged))


def trainer_state(module: Any) -> "TrainerState":
    """Where the training is, as rewards with the signature of TRL expect it; outside of a fit, at step 0 of 1."""
    from transformers import TrainerState  # takes seconds, which most rewards need not spend

    trainer = module.trainer
    if trainer.state.fn != TrainerFn.FITTING:
        return TrainerState(max_steps=1)
    epoch, batches = float(trainer.current_epoch), trainer.num_training_batches
    if trainer.training and 0 < batches < math.inf:
        epoch += max(trainer.fit_loop.batch_idx, 0) / batches
    return TrainerState(
        epoch=epoch,
        global_step=trainer.global_step,
        max_steps=module.plan.steps or 0,  # 0: nothing but a clock ends the run
        num_train_epochs=max(trainer.max_epochs or 0, 0),
        train_batch_size=prompts_a_batch(module),
        is_local_process_zero=trainer.local_rank == 0,
        is_world_process_zero=trainer.is_global_zero,
    )


def logged_means(module: Any, logged: dict[str, list[float]]) -> dict[str, Tensor]:
    """Means of what the module's reward has logged itself, over all ranks, by name; every rank must call."""
    if not module.reward.logs_metrics:
        return {}
    found: dict[str, list[float]] = {}
    for of_rank in over_ranks(module.trainer, logged):
        for name, values in of_rank.items():
            found.setdefault(name, []).extend(values)
    return {name: torch.tensor(values, dtype=torch.float64).mean().float() for name, values in found.items()}


def log_iteration(module: Any, values: dict[str, Any], progress: Sequence[str]) -> None:
    """Log what a method counts of an iteration, and what its reward logs itself.

    Args:
        module: The one in training.
        values: Scalars by name.
        progress: Names to show in the progress bar.

    Raises:
        UserError: If the reward logs something under a name of the method's own.
    """
    found = logged_means(module, module.scorer.logged_metrics())
    if taken := sorted(found.keys() & values.keys()):
        raise UserError(
            f"reward {module.reward.name}: log_metric({taken[0]!r}) is a name that {type(module).__name__} logs itself; "
            "choose another"
        )
    log_training(module, {**found, **values}, progress)


def count_without_signal(module: Any, found: str, metric: str) -> None:
    """Count an iteration whose scores teach nothing; the first time, log a warning.

    Args:
        module: Has ``without_signal`` and ``reward``.
        found: Which responses have the same score.
        metric: Name under which the count is logged.
    """
    module.without_signal += 1
    if module.without_signal == 1:
        log.warning(
            "iteration %d: %s have the same reward (%s), so that nothing is learnt from them; "
            "if it stays so (%s), the task is too easy, too hard, or the reward is constant",
            module.iteration,
            found,
            module.reward.name,
            metric,
        )


def all_equal(module: Any, x: Tensor) -> bool:
    """Whether all values, of all ranks, are the same one. Shape (n,), n at least 1."""
    extremes = torch.stack([-x.min(), x.max()])
    if module.trainer.world_size > 1:
        extremes = module.trainer.strategy.reduce(extremes, reduce_op="max")
    return not bool(extremes.sum())


def prompts_a_batch(module: Any) -> int:
    """As the data module has them; 1 without one."""
    datamodule: Any = getattr(module.trainer, "datamodule", None)
    return datamodule.batch_size if datamodule is not None else 1


def fewest(module: Any, size: int, rows: int) -> int:
    """How many batches of ``size`` the rank with the fewest rows has: all ranks must step equally often, or they hang."""
    return least(module, math.ceil(rows / size))


def least(module: Any, number: int) -> int:
    """The smallest of the ranks' numbers."""
    if module.trainer.world_size == 1:
        return number
    return int(module.trainer.strategy.reduce(torch.tensor(number, device=module.device), reduce_op="min"))


def all_sum(module: Any, x: Tensor) -> Tensor:
    """Sum over ranks."""
    return module.trainer.strategy.reduce(x.clone(), reduce_op="sum") if module.trainer.world_size > 1 else x
