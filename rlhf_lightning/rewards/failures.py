"""What happens when a reward raises, hangs or returns nonsense in the middle of a run."""

import inspect
import logging
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import UserError, harmless
from rlhf_lightning.losses.checks import require_interface
from rlhf_lightning.rewards.reward import Reward, Samples, checked_scores

if TYPE_CHECKING:
    from transformers import TrainerState

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardFailures:
    """What becomes of an iteration whose responses could not be scored. A failed response never counts as zero.

    A call that hangs can't be killed in Python: its thread is left to itself, whatever it returns is dropped, it ends with
    the process, and a retry may run beside it. A reward that asks a server should have a timeout of its own.

    Attributes:
        retries: How often the scoring of an iteration is tried again.
        then: "stop" the run, or "skip" the iteration: weights, optimizer, schedule and KL control stay as they are.
        max_skips: So many skipped iterations in a row stop the run: the reward is dead.
        timeout: Seconds after which a call counts as failed; None waits for ever.
    """

    retries: int = 0
    then: Literal["stop", "skip"] = "stop"
    max_skips: int = 5
    timeout: float | None = None

    def __post_init__(self) -> None:
        """Refuse what no run can follow."""
        if self.retries < 0 or self.max_skips < 1 or (self.timeout is not None and self.timeout <= 0):
            raise UserError(f"retries is at least 0, max_skips at least 1, a timeout more than 0 seconds: {self}")


class RewardTimeout(Exception):
    """A reward took longer than it was given."""


class IterationSkipped(Exception):
    """The responses of this iteration have no scores, on any rank; go on with the next."""


class GuardedReward(Reward):
    """A reward whose failures end in one line that names reward and cause, or as configured in the midst of training.

    Attributes:
        failures: Calls that failed so far in training, on all ranks.
        skipped: Iterations that were skipped so far.
    """

    skips_special_tokens = False  # the reward itself is asked

    def __init__(
        self,
        reward: Reward,
        plan: RewardFailures,
        all_sum: Callable[[Tensor], Tensor],
        state: "Callable[[], TrainerState] | None" = None,
    ) -> None:
        """Wrap a reward.

        Args:
            reward: Anything.
            plan: What to do.
            all_sum: Sums a scalar over ranks.
            state: Returns where the training is.
        """
        if inspect.isroutine(reward):
            name = reward.__name__
            raise UserError(
                f"reward: {name} is a function; give FunctionReward({name}), from rlhf_lightning.rewards.function"
            )
        require_interface("reward", reward, Reward)
        self.reward, self.plan, self.all_sum, self.state_of_training = reward, plan, all_sum, state
        self.logged: dict[str, list[float]] = {}
        self.validated: dict[str, list[float]] = {}  # what was logged in the validation that is under way
        self.device = torch.device("cpu")
        self.failures = self.skipped = self.in_a_row = 0

    @property
    def name(self) -> str:
        return self.reward.name

    def prepare(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.reward.prepare(device)

    def networks(self) -> list[nn.Module]:
        return self.reward.networks()

    def parts(self) -> dict[str, Tensor]:
        return self.reward.parts()

    def logged_metrics(self) -> dict[str, list[float]]:
        """What the reward has logged since this was called last, in all calls that did not fail."""
        logged, self.logged = self.logged, {}
        return logged

    def score(self, samples: Samples) -> Tensor:
        """The scores outside of training (validation, prediction), where a failure always stops.

        Raises:
            UserError: Names the reward and the cause.
        """
        cause: Exception | None = None
        for _ in range(self.plan.retries + 1):
            scores, cause = self.attempt(samples, "outside of training")
            if scores is not None:
                return scores
        raise UserError(f"reward {self.name} failed outside of training: {in_short(cause)}") from cause

    def during(self, iteration: int) -> "Iteration":
        """The same reward in an iteration of training, where it fails on all ranks alike and as configured."""
        self.logged = {}
        return Iteration(self, iteration)

    def attempt(self, samples: Samples, where: str) -> tuple[Tensor | None, Exception | None]:
        """One call: scores, or what went wrong, which is told in full."""
        if self.state_of_training is not None and self.reward.reads_trainer_state:
            self.reward.set_trainer_state(self.state_of_training())
        call = Call(self.reward, samples, self.device)
        if self.plan.timeout is None:
            call.run()
        else:
            call.start()
            call.join(self.plan.timeout)
        scores, cause = call.scores, call.error
        if scores is None:
            cause = cause or RewardTimeout(f"no answer within {self.plan.timeout:g} s")
            log.warning("reward %s failed %s: %s", self.name, where, in_full(cause))
        else:
            for name, values in self.reward.logged_metrics().items():
                self.logged[name] = self.logged.get(name, []) + values
        return scores, cause

    def metrics(self) -> dict[str, Tensor | float]:
        """What is logged with every iteration."""
        return {"rewards/failures": float(self.failures), "rewards/skipped_iterations": float(self.skipped)}

    def state(self) -> dict[str, int]:
        """The counters, for a checkpoint."""
        return {"failures": self.failures, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state(self, state: dict[str, int]) -> None:
        """Go on counting."""
        self.failures, self.skipped, self.in_a_row = state["failures"], state["skipped"], state["in_a_row"]


class Iteration(Reward):
    """A guarded reward in one iteration."""

    skips_special_tokens = False

    def __init__(self, guarded: GuardedReward, number: int) -> None:
        self.guarded, self.number = guarded, number

    @property
    def name(self) -> str:
        return self.guarded.name

    def networks(self) -> list[nn.Module]:
        return self.guarded.networks()

    def score(self, samples: Samples) -> Tensor:
        """The scores: every rank has them, or none.

        Raises:
            UserError: If the run is to stop; names the reward, the iteration and the cause.
            IterationSkipped: If the iteration is to be skipped.
        """
        guarded = self.guarded
        scores: Tensor | None = None
        cause: Exception | None = None
        for _ in range(guarded.plan.retries + 1):
            if scores is None:
                scores, cause = guarded.attempt(samples, f"in iteration {self.number}")
            failed = int(guarded.all_sum(torch.tensor(int(scores is None), device=guarded.device)))
            guarded.failures += failed
            if scores is not None and not failed:
                guarded.in_a_row = 0
                return scores
        raise self._given_up(cause) from cause

    def _given_up(self, cause: Exception | None) -> Exception:
        guarded, plan = self.guarded, self.guarded.plan
        what = f"reward {self.name} failed in iteration {self.number}"
        if plan.then == "stop":
            return UserError(f"{what}: {in_short(cause)}; model.update.reward_failures can retry or skip")
        guarded.skipped += 1
        guarded.in_a_row += 1
        if guarded.in_a_row >= plan.max_skips:
            return UserError(f"{what}, as in the {plan.max_skips - 1} before it (max_skips): {in_short(cause)}")
        log.warning("%s; skipped, the weights stay (%d skipped so far)", what, guarded.skipped)
        return IterationSkipped(what)


class Call(threading.Thread):
    """One call of a reward, in this thread (``run``) or in a daemon's (``start``), that keeps what was raised.

    Autocast, gradient mode and the current GPU belong to a thread; the call sees those of the thread that makes it.
    """

    def __init__(self, reward: Reward, samples: Samples, device: torch.device) -> None:
        super().__init__(name=f"reward {reward.name}", daemon=True)
        self.reward, self.samples, self.device = reward, samples, device
        kind = device.type
        self.autocast = torch.autocast(
            kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
        )
        self.scores: Tensor | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        with self, self.autocast, torch.no_grad():
            self.scores = checked_scores(self.reward, self.samples)

    def __enter__(self) -> None:
        """Nothing: only what is raised is of interest."""

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> bool:
        """A reward is the user's own code and may raise anything; it is told in full, and never passed over."""
        self.error = error if isinstance(error, Exception) else None
        return self.error is not None


def in_full(error: Exception) -> str:
    """What was raised: a line if it explains itself, else with its traceback."""
    return in_short(error) if ours(error) else harmless("".join(traceback.format_exception(error)).strip())


def in_short(error: Exception | None) -> str:
    """Type and first line of what was raised; None is another rank's."""
    if error is None:
        return "on another rank"
    first = (str(error).strip().splitlines() or [""])[0]
    return first if ours(error) else f"{type(error).__name__}: {first}"


def ours(error: Exception) -> bool:
    """Whether its message says all."""
    return isinstance(error, UserError | RewardTimeout)
