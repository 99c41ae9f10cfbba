"""The list of comparisons."""

from dataclasses import dataclass, field
from typing import Any

from rlhf_lightning.losses import (
    AlphaDivergence,
    AOTLoss,
    APODownLoss,
    APOZeroLoss,
    BCOPairLoss,
    CPOLoss,
    DPOLoss,
    EXOLoss,
    FDPOLoss,
    ForwardKL,
    HingeLoss,
    IPOLoss,
    JensenShannon,
    LDDPOLoss,
    MixedLoss,
    NCALoss,
    NormalisedDPOLoss,
    ORPOLoss,
    PairLoss,
    RobustDPOLoss,
    SimPOLoss,
    SPPOHardLoss,
    WPOLoss,
)  # fmt: skip
from rlhf_lightning.losses.dpo import DiscoPOPLoss
from tests.peers.problem import BOS, EOS, EVEN, UNEVEN


@dataclass(frozen=True)
class Offline:
    """One optimizer step of an offline method.

    Attributes:
        method: sft, reward or dpo; cpo and orpo are dpo by other trainers of TRL.
        architecture: Of the networks.
        trl: Settings of TRL's trainer.
        loss: Coefficients of our loss.
        kind: Our pair loss.
        pairs: The rows.
        micro_batches: How many the step is made of, on TRL's side.
        ours_in: The same on our side.
        reference: Which network DPO is held against.
        pad: What TRL's tokenizer pads with.
        end: What ends a response on our side.
        begin: What a prompt begins with on our side.
    """

    method: str
    architecture: str = "llama"
    trl: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    kind: type[PairLoss] = DPOLoss
    pairs: list[dict[str, Any]] = field(default_factory=lambda: UNEVEN)
    micro_batches: int = 1
    ours_in: int = 1
    reference: str = "reference"
    pad: str = "<pad>"
    end: tuple[int, ...] = (EOS,)
    begin: tuple[int, ...] = ()


BETA = 0.3


def pair(loss_type: str, kind: type[PairLoss], trl: dict[str, Any] | None = None, **loss: Any) -> Offline:
    """TRL's DPO trainer with one of its losses, and our loss of another name."""
    settings = {"beta": BETA, "loss_type": [loss_type], **(trl or {})}
    return Offline("dpo", trl=settings, loss={"beta": BETA, **loss}, kind=kind)


def divergence(name: str, ours: Any, **trl: float) -> Offline:
    """TRL's DPO under another divergence."""
    return pair("sigmoid", FDPOLoss, {"f_divergence_type": name, **trl}, divergence=ours)


# What our pair losses are called at TRL.
PAIR_LOSSES: dict[str, Offline] = {
    "robust": pair("robust", RobustDPOLoss, {"label_smoothing": 0.1}, label_smoothing=0.1),
    "hinge": pair("hinge", HingeLoss),
    "exo": pair("exo_pair", EXOLoss, {"label_smoothing": 0.01}, label_smoothing=0.01),
    "nca": pair("nca_pair", NCALoss),
    "bco": pair("bco_pair", BCOPairLoss),
    "sppo": pair("sppo_hard", SPPOHardLoss),
    "apo-zero": pair("apo_zero", APOZeroLoss),
    "apo-down": pair("apo_down", APODownLoss),
    "aot": pair("aot", AOTLoss, {"label_smoothing": 0.1}, label_smoothing=0.1),
    "discopop": pair("discopop", DiscoPOPLoss, {"discopop_tau": 0.2}, tau=0.2),
    "normalised": pair("sigmoid_norm", NormalisedDPOLoss),
    "ld": pair("sigmoid", LDDPOLoss, {"ld_alpha": 0.4}, alpha=0.4),
    "forward-kl": divergence("forward_kl", ForwardKL()),
    "jensen-shannon": divergence("js_divergence", JensenShannon()),
    "alpha": divergence("alpha_divergence", AlphaDivergence(0.3), f_alpha_divergence_coef=0.3),
    "wpo": Offline("dpo", trl={"beta": BETA, "use_weighting": True}, loss={"loss": DPOLoss(BETA)}, kind=WPOLoss),
    "mixed": Offline(
        "dpo",
        trl={"beta": BETA, "loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]},
        loss={"losses": [DPOLoss(BETA), BCOPairLoss(BETA)], "weights": [0.8, 0.2]},
        kind=MixedLoss,
    ),
    "cpo": Offline(
        "cpo",
        trl={"beta": BETA, "loss_type": "sigmoid", "cpo_alpha": 0.0},
        loss={"beta": BETA, "nll_coef": 0.0},
        kind=CPOLoss,
        begin=(BOS,),
    ),
    "simpo": Offline(
        "cpo",
        trl={"beta": 2.0, "loss_type": "simpo", "simpo_gamma": 0.7, "cpo_alpha": 0.0},
        loss={"beta": 2.0, "gamma": 0.7},
        kind=SimPOLoss,
        begin=(BOS,),
    ),
}
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
    "ipo-even": Offline(
        "dpo", trl={"beta": BETA, "loss_type": ["ipo"]}, loss={"tau": BETA / 4}, kind=IPOLoss, pairs=EVEN
    ),
    "ipo-uneven": Offline("dpo", trl={"beta": BETA, "loss_type": ["ipo"]}, loss={"tau": BETA}, kind=IPOLoss),
    **PAIR_LOSSES,
    "orpo": Offline("orpo", trl={"beta": BETA}, loss={"beta": BETA}, kind=ORPOLoss, begin=(BOS,)),
}


@dataclass(frozen=True)
class Online:
    """One PPO iteration of two passes over eight scripted responses.

        Attributes:
            responses: Which of the scripted responses: "full" ones fill the buffer, "early" ones stand before padding.
            architecture: Of the networks.
            gae_lambda: lambda.
            whiten_rewards: Whether rewards are scaled to unit variance.
    Of plain gradient descent; so large that the second pass meets both clips.
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
