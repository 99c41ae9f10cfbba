"""The one list of all methods. Tests that every method has to pass are parametrized with it.

A method is a LightningModule of the package with the settings that make the method what it is. A new entry takes part in
every kind of test at once: :func:`methods_for` gives all entries but those that ``EXEMPT`` names with a reason.
``tests/test_methods.py`` fails if a module of the package is in no entry, or in no kind of test.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl

from rlhf_lightning.losses import (
    AlphaDivergence,
    AOTLoss,
    APODownLoss,
    APOZeroLoss,
    APOZeroUnpairedLoss,
    BCOPairLoss,
    BCOUnpairedLoss,
    BradleyTerryLoss,
    CISPOLoss,
    ClippedLoss,
    CPOLoss,
    DPOLoss,
    EXOLoss,
    FDPOLoss,
    HingeLoss,
    IPOLoss,
    JensenShannon,
    KTOLoss,
    LDDPOLoss,
    MixedLoss,
    NCALoss,
    NLLLoss,
    NormalisedDPOLoss,
    ORPOLoss,
    OutcomeLoss,
    PairLoss,
    PlackettLuceLoss,
    PolicyObjective,
    PPOLoss,
    ReinforceLoss,
    RobustDPOLoss,
    SequenceClippedLoss,
    SimPOLoss,
    SPPOHardLoss,
    WPOLoss,
)
from rlhf_lightning.losses.dpo import DiscoPOPLoss, DPOPLoss
from rlhf_lightning.models.ensemble import Ensemble
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import (
    DPOModule,
    GRPOModule,
    KTOModule,
    OnlineDPOModule,
    PPOModule,
    ProcessRewardModule,
    RewardModelModule,
    SFTModule,
)
from rlhf_lightning.modules.grpo_update import Groups, GRPOUpdate
from rlhf_lightning.modules.moving_reference import MovingReference
from rlhf_lightning.modules.ppo_update import PPOUpdate
from rlhf_lightning.rollouts.group_advantages import BatchMean, GreedyBaseline, GroupMean, LeaveOneOut, ReturnToGo


@dataclass(frozen=True)
class Method:
    """A module and what it reads.

    Attributes:
        module: The class.
        rows: Kind of its rows; a sampling method reads "prompts".
        settings: Arguments of the class that make it this method.
        groups: Responses to each prompt, for methods that compare them.
        critic: Whether PPO has a critic with weights of its own.
    """

    module: type[pl.LightningModule]
    rows: str
    settings: dict[str, Any] = field(default_factory=dict)
    groups: Groups | None = None
    critic: bool = False

    @property
    def samples(self) -> bool:
        """Whether it learns from responses that it draws itself."""
        return self.rows == "prompts"

    @property
    def together(self) -> int:
        """Responses that its micro-batches must not separate."""
        return 2 if self.module is OnlineDPOModule else 1

    def build(self, spec: ModelSpec, scalar: str = "", group_size: int | None = None, **settings: Any) -> Any:
        """The module.

        Args:
            spec: Of the network that is trained.
            scalar: Folder of a trained scalar model, for a critic.
            group_size: Responses to each prompt, in place of the method's own number.
            settings: Further arguments of the class; a sampling method's ``update`` as a dictionary.
        """
        first = "network" if self.module in (RewardModelModule, ProcessRewardModule) else "policy"
        if self.module is RewardModelModule:
            settings = {"normalise": False} | settings
        if self.module is PPOModule:
            settings["critic"] = replace(spec, path=scalar, architecture=None) if self.critic else None
        if self.groups is not None:
            settings["groups"] = replace(self.groups, size=group_size or self.groups.size)
        if "update" in settings:
            settings["update"] = (PPOUpdate if self.module is PPOModule else GRPOUpdate)(**settings["update"])
        return self.module(**{first: spec}, **self.settings, **settings)


def pairs(loss: PairLoss, **settings: Any) -> Method:
    return Method(DPOModule, "pairs", {"loss": loss, **settings})


def group(advantages: Any, objective: PolicyObjective, **groups: Any) -> Method:
    settings = {"advantages": advantages, "objective": objective}
    return Method(GRPOModule, "prompts", settings, Groups(size=2, **groups))


def ppo(critic: bool) -> Method:
    return Method(PPOModule, "prompts", {"loss": PPOLoss(value_coef=0.5, entropy_coef=0.01)}, critic=critic)


# A bug in one of them shows in the sum. Weights bring squares and exponentials down to the size of the others.
PAIR_LOSSES: dict[PairLoss, float] = {
    RobustDPOLoss(0.3): 1.0,
    HingeLoss(0.3): 1.0,
    EXOLoss(0.3, 0.1): 1.0,
    NormalisedDPOLoss(2.0): 1.0,
    LDDPOLoss(0.3): 1.0,
    FDPOLoss(0.3, JensenShannon()): 1.0,
    FDPOLoss(0.3, AlphaDivergence(0.9)): 0.1,
    NCALoss(0.3): 1.0,
    BCOPairLoss(0.3): 1.0,
    SPPOHardLoss(0.5): 0.01,
    APOZeroLoss(0.3): 1.0,
    APODownLoss(0.3): 1.0,
    WPOLoss(SimPOLoss()): 1.0,
    CPOLoss(0.3, nll_coef=0.1): 1.0,
    ORPOLoss(): 1.0,
    NLLLoss(per_token=True): 1.0,
    DPOPLoss(0.3): 1.0,
    DiscoPOPLoss(0.3): 1.0,
}
EVERY_PAIR_LOSS = MixedLoss(list(PAIR_LOSSES), list(PAIR_LOSSES.values()))

METHODS: dict[str, Method] = {
    "sft": Method(SFTModule, "texts"),
    "sft, weighted": Method(SFTModule, "weighted texts"),
    "process reward": Method(ProcessRewardModule, "steps"),
    "reward model": Method(
        RewardModelModule, "annotated pairs", {"loss": BradleyTerryLoss(centering_coef=0.05, margin_scale=0.7)}
    ),
    "rankings, ensemble": Method(
        RewardModelModule,
        "rankings",
        {"loss": BradleyTerryLoss(centering_coef=0.05), "ensemble": Ensemble(2, "own")},
    ),
    "plackett-luce": Method(RewardModelModule, "rankings", {"loss": PlackettLuceLoss()}),
    "outcome verifier": Method(RewardModelModule, "unpaired", {"loss": OutcomeLoss()}),
    "dpo": pairs(DPOLoss(beta=0.3, label_smoothing=0.1)),
    "ipo": pairs(IPOLoss(tau=0.5)),
    "robust dpo": pairs(RobustDPOLoss(beta=0.5)),
    "hinge": pairs(HingeLoss(beta=0.5)),
    "nca": pairs(NCALoss(beta=0.5)),
    "simpo": pairs(SimPOLoss()),
    "every pair loss": pairs(EVERY_PAIR_LOSS, moving_reference=MovingReference(every=1)),
    "aot": pairs(AOTLoss(beta=0.3)),
    "kto": Method(KTOModule, "unpaired", {"loss": KTOLoss(0.3, 1.2, 0.8)}),
    "apo-zero, unpaired": Method(KTOModule, "unpaired", {"loss": APOZeroUnpairedLoss(0.3, 1.2, 0.8)}),
    "bco, unpaired": Method(KTOModule, "unpaired", {"loss": BCOUnpairedLoss(0.3, 1.2, 0.8)}),
    "ppo": ppo(critic=True),
    "ppo, shared trunk": ppo(critic=False),
    "grpo": group(GroupMean(), PolicyObjective("sequence_mean", "loss_k3_token", entropy_coef=0.01)),
    "rloo": group(LeaveOneOut(), PolicyObjective("sequence_sum", "reward_k1", ReinforceLoss())),
    "rloo, sequence ratio": group(
        LeaveOneOut(),
        PolicyObjective("sequence_sum", "reward_k1", SequenceClippedLoss(0.2, 0.2, length_normalised=False)),
    ),
    "reinforce": group(BatchMean(), PolicyObjective("sequence_sum", "reward_k1", ReinforceLoss())),
    "reinforce++": group(
        ReturnToGo(group_baseline=True), PolicyObjective("token_mean", "loss_k2_sequence", CISPOLoss())
    ),
    "dapo": group(GroupMean(), PolicyObjective("token_mean", "reward_k1", ClippedLoss(clip_high=0.28))),
    "gspo": group(
        GroupMean(scale="batch"),
        PolicyObjective("constant_length", "loss_k3_token", SequenceClippedLoss()),
        mask_truncated=True,
    ),
    "cispo": group(GroupMean(), PolicyObjective("token_mean", "loss_k3_token", CISPOLoss())),
    "remax": group(GreedyBaseline(), PolicyObjective("sequence_sum", "reward_k1", ClippedLoss())),
    # Three responses, so that the best, the worst and one between them are told apart.
    "online dpo": Method(OnlineDPOModule, "prompts", {"loss": DPOLoss(beta=0.3, label_smoothing=0.1)}, Groups(size=3)),
    "online simpo": Method(OnlineDPOModule, "prompts", {"loss": SimPOLoss()}, Groups(size=3)),
}

# ---------------------------------------------------------------- kinds of tests, and what they leave out

IN_THE_SUM = dict.fromkeys(("robust dpo", "hinge", "nca", "simpo"), "its loss is a part of 'every pair loss'")
PARTS = "its baseline, loss and aggregation are each those of another group method in this list"
GROUP_PARTS = dict.fromkeys(("rloo, sequence ratio", "reinforce", "dapo", "cispo"), PARTS)
COEFFICIENTS = "another loss of the same module, which keeps nothing more in a checkpoint"
SAME_FORWARD = "the forward of another method of this list, and another formula"
OTHER_ROWS = "the forward of another method of this list, on other rows"
PLAIN_LOOP = "no run of TRL is recorded; ground_truth/test_plain_loops.py has an independent loop"
NO_PEER = "TRL has nothing that computes the same; ground_truth/ has its gradients"

# Kind of test -> method -> reason.
EXEMPT: dict[str, dict[str, str]] = {
    # invariance/test_layouts.py: padding, order of the rows, micro-batches.
    "layout": IN_THE_SUM | GROUP_PARTS,
    # invariance/test_two_ranks.py: two processes and one do the same.
    # precision/: the first step in half precision, float32 batches and metrics, master weights.
    "precision": dict.fromkeys(("sft, weighted", "rankings, ensemble", "plackett-luce", "outcome verifier"), OTHER_ROWS)
    | dict.fromkeys(("every pair loss", "aot", "online simpo"), SAME_FORWARD),
    # ground_truth/test_plain_loops.py: every step is that of an independent loop.
    "gradient": IN_THE_SUM
    | dict.fromkeys(
        (name for name, method in METHODS.items() if method.module in (GRPOModule, PPOModule)),
        "ground_truth/test_gradients.py and test_group_gradients.py enumerate its expected step",
    )
    | {
        "every pair loss": "unit/test_pair_losses.py has the value of each of its losses",
        "aot": "unit/test_pair_losses.py has its values by hand",
        "rankings, ensemble": "two reward models, each of which learns as it would alone: unit/models/test_scalar_model.py",
    },
    # invariance/test_memory.py: how many logits exist at once.
    "memory": IN_THE_SUM
    | GROUP_PARTS
    | dict.fromkeys(("sft, weighted", "ipo", "every pair loss", "aot", "online simpo"), SAME_FORWARD)
    | dict.fromkeys(("apo-zero, unpaired", "rloo", "reinforce++", "gspo", "remax"), SAME_FORWARD)
    | dict.fromkeys(
        ("process reward", "reward model", "rankings, ensemble", "plackett-luce", "outcome verifier"),
        "it has no vocabulary: one score a position",
    ),
    # invariance/test_normaliser.py: what is differentiated is what is logged.
    "logged mean": IN_THE_SUM
    | {
        "every pair loss": SAME_FORWARD,
        "rankings, ensemble": "the sum over members is differentiated, their mean logged",
    }
    | dict.fromkeys(
        ("aot", "kto", "bco, unpaired"), "it asks a Trainer for the other ranks; test_layouts.py compares losses"
    )
    | dict.fromkeys(
        (name for name, method in METHODS.items() if method.samples),
        "an iteration has many optimizer steps; test_layouts.py compares its losses",
    ),
    # invariance/test_validation_numbers.py: what a validation counts.
    "validation": IN_THE_SUM
    | GROUP_PARTS
    | {"every pair loss": "its reference moves between the step and the validation"}
    | dict.fromkeys(("bco, unpaired", "rankings, ensemble"), SAME_FORWARD),
    # resume/: killed and resumed, bit for bit.
    "resume": dict.fromkeys(
        ("sft, weighted", "plackett-luce", "outcome verifier", "ipo", "every pair loss", "aot"),
        COEFFICIENTS,
    )
    | dict.fromkeys(("kto", "apo-zero, unpaired", "ppo, shared trunk", "rloo", "reinforce++", "gspo"), COEFFICIENTS)
    | dict.fromkeys(("remax", "online simpo", *IN_THE_SUM, *GROUP_PARTS), COEFFICIENTS),
    # peers/: TRL's recorded numbers.
    "peer": dict.fromkeys(("process reward", "online dpo", "online simpo", "outcome verifier"), PLAIN_LOOP)
    | dict.fromkeys(("sft, weighted", "rankings, ensemble", "plackett-luce"), NO_PEER)
    | dict.fromkeys(("bco, unpaired", "ppo, shared trunk", "rloo", "reinforce", "reinforce++", "remax"), NO_PEER),
    "two ranks": IN_THE_SUM
    | GROUP_PARTS
    | {"kto": "its reference point pairs each prompt with the answer of the row before it, which two ranks divide"},
}


def methods_for(kind: str) -> list[str]:
    """The names of the methods that a kind of test runs."""
    return [name for name in METHODS if name not in EXEMPT[kind]]


def one_of_each_module(kind: str) -> list[str]:
    """The first method of each module that a kind of test runs."""
    first: dict[type, str] = {}
    for name in methods_for(kind):
        first.setdefault(METHODS[name].module, name)
    return list(first.values())
