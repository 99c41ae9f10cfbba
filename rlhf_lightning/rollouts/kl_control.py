"""How strong the pull to the reference is, iteration by iteration."""

from abc import ABC, abstractmethod

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.rewards import adaptive_kl_coef


class KLControl(ABC):
    """Holds the KL coefficient."""

    coef: float

    @abstractmethod
    def update(self, kl: float, episodes: int) -> None:
        """Take note of an iteration: its mean KL of a whole response in nats, and how many responses it had."""

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps: nothing, where the configuration says it all."""
        return {}

    def load_state(self, state: dict[str, float]) -> None:  # noqa: B027  (as above)
        """Go on from there."""


class FixedKL(KLControl):
    """A constant coefficient."""

    def __init__(self, coef: float = 0.05) -> None:
        """Check the coefficient.

        Args:
            coef: Weight of the KL penalty. At least 0.
        """
        if coef < 0:
            raise UserError(f"the KL coefficient must not be negative, not {coef}")
        self.coef = coef

    def update(self, kl: float, episodes: int) -> None:
        """Nothing changes."""


class AdaptiveKL(KLControl):
    """Steers the KL to a target: :func:`rlhf_lightning.functional.rewards.adaptive_kl_coef`."""

    def __init__(self, init: float = 0.15, target: float = 6.0, horizon: float = 10_000) -> None:
        """Check the numbers.

        Args:
            init: The first coefficient.
            target: KL of a response to steer to, in nats.
            horizon: Number of episodes that a full reaction takes.
        """
        if min(init, target, horizon) <= 0:
            raise UserError(f"AdaptiveKL needs positive numbers, not {init=}, {target=}, {horizon=}")
        self.coef, self.target, self.horizon = init, target, horizon

    def update(self, kl: float, episodes: int) -> None:
        self.coef = adaptive_kl_coef(self.coef, kl, target=self.target, horizon=self.horizon, episodes=episodes)

    def state(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]
