"""The list of comparisons."""

from dataclasses import dataclass, field
from typing import Any

from tests.peers.problem import EOS, EVEN, UNEVEN


@dataclass(frozen=True)
class Offline:
    """One optimizer step of an offline method.

    Attributes:
        method: sft, reward or dpo.
        architecture: Of the networks.
        trl: Settings of TRL's trainer.
        loss: Name of our loss and its coefficients, for methods that take one.
        pairs: The rows.
        micro_batches: How many the step is made of, on TRL's side.
        ours_in: The same on our side.
        reference: Which network DPO is held against.
        pad: What TRL's tokenizer pads with.
        end: What ends a response on our side.
    """

    method: str
    architecture: str = "llama"
    trl: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    pairs: list[dict[str, Any]] = field(default_factory=lambda: UNEVEN)
    micro_batches: int = 1
    ours_in: int = 1
    reference: str = "reference"
    pad: str = "<pad>"
    end: tuple[int, ...] = (EOS,)


BETA = 0.3
OFFLINE: dict[str, Offline] = {
    "sft-llama": Offline("sft"),
    "sft-gpt2": Offline("sft", "gpt2"),
    "sft-accumulated": Offline("sft", micro_batches=2, ours_in=2),
    "reward-llama": Offline("reward", trl={"center_rewards_coefficient": 0.1}, loss={"centering_coef": 0.1}),
    "reward-gpt2": Offline("reward", "gpt2", trl={"center_rewards_coefficient": 0.1}, loss={"centering_coef": 0.1}),
    "reward-padded-with-eos": Offline("reward", loss={"centering_coef": 0.0}, pad="<eos>", end=()),
    "dpo-llama": Offline("dpo", trl={"beta": BETA}, loss={"beta": BETA}),
    "dpo-gpt2": Offline("dpo", "gpt2", trl={"beta": BETA}, loss={"beta": BETA}),
    "dpo-at-its-reference": Offline("dpo", trl={"beta": BETA}, loss={"beta": BETA}, reference="policy"),
    "dpo-smoothed": Offline(
        "dpo", trl={"beta": BETA, "label_smoothing": 0.1}, loss={"beta": BETA, "label_smoothing": 0.1}
    ),
    "aot-one-pair-at-a-time": Offline(
        "dpo",
        trl={"beta": BETA, "label_smoothing": 0.1, "loss_type": ["aot"]},
        loss={"beta": BETA, "label_smoothing": 0.1},
        micro_batches=4,
    ),
    "ipo-even": Offline("dpo", trl={"beta": BETA, "loss_type": ["ipo"]}, loss={"tau": BETA / 4}, pairs=EVEN),
    "ipo-uneven": Offline("dpo", trl={"beta": BETA, "loss_type": ["ipo"]}, loss={"tau": BETA}),
}


@dataclass(frozen=True)
class Online:
    """One PPO iteration of two passes over eight scripted responses.

        Attributes:
            responses: Which of the scripted responses: "full" ones fill the buffer, "early" ones stand before padding.
            architecture: Of the networks.
            gae_lambda: lambda.
            whiten_rewards: Whether rewards are scaled to unit variance.
    XX gradient descent; so large that the second pass meets both clips.
    """

    responses: str
    architecture: str = "llama"
    gae_lambda: float = 0.95
    whiten_rewards: bool = False
    micro_batches: int = 1
    last_batch: bool = False


TEMPERATURE, KL_COEF, MISSING_EOS_PENALTY, VALUE_COEF, CLIP, VALUE_CLIP = 0.7, 0.3, 1.5, 0.25, 0.2, 0.2
LR = 0.05  # of plain gradient descent; so large that the second pass meets both clips
ONLINE: dict[str, Online] = {
    "ppo-full-llama": Online("full"),
    "ppo-full-gpt2": Online("full", "gpt2"),
    "ppo-full-whitened": Online("full", whiten_rewards=True),
    "ppo-early": Online("early"),
    "ppo-early-monte-carlo": Online("early", gae_lambda=1.0),
    "ppo-early-whitened": Online("early", whiten_rewards=True),
    "ppo-early-accumulated": Online("early", gae_lambda=1.0, micro_batches=2),
    "ppo-early-accumulated-last": Online("early", gae_lambda=1.0, micro_batches=2, last_batch=True),
}
