"""KTO's comparisons with TRL: each of the pairs as a liked and a disliked completion, in turn."""

from dataclasses import dataclass, field
from typing import Any

from rlhf_lightning.losses import APOZeroUnpairedLoss, KTOLoss, UnpairedLoss
from tests.peers.problem import UNEVEN

BETA, WEIGHTS = 0.3, {"desirable_weight": 1.2, "undesirable_weight": 0.8}
ROWS = [
    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
    for pair in UNEVEN
    for side in ("chosen", "rejected")
]


@dataclass(frozen=True)
class Unpaired:
    """One optimizer step on all rows.

    Attributes:
        architecture: Of the networks.
        trl: Settings of TRL's trainer.
        loss: Ours.
        policy: Which network is trained; the other one is the reference.
        micro_batches: How many the step is made of, on both sides.
    """

    architecture: str = "llama"
    trl: dict[str, Any] = field(default_factory=lambda: {"beta": BETA, **WEIGHTS})
    loss: UnpairedLoss = KTOLoss(BETA, **WEIGHTS)  # noqa: RUF009  (frozen)
    policy: str = "policy"
    micro_batches: int = 1


UNPAIRED: dict[str, Unpaired] = {
    "kto-llama": Unpaired(),
    "kto-gpt2": Unpaired("gpt2"),
    "kto-networks-swapped": Unpaired(policy="reference"),  # of the two, one has a mean below zero
    "kto-accumulated": Unpaired(micro_batches=2),
    "apo-zero-unpaired": Unpaired(
        trl={"beta": BETA, "loss_type": "apo_zero_unpaired", **WEIGHTS}, loss=APOZeroUnpairedLoss(BETA, **WEIGHTS)
    ),
}


def roles(case: Unpaired) -> tuple[str, str]:
    """Names of policy and reference."""
    return case.policy, {"policy": "reference", "reference": "policy"}[case.policy]
