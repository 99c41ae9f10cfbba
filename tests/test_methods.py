"""No method is on the side: every module is in the registry, and every kind of test runs it or says why not."""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest
from lightning.pytorch import LightningModule

from rlhf_lightning import modules
from rlhf_lightning.losses import LabelledLoss, ListLoss, PairLoss, PolicyLoss, RankingLoss, UnpairedLoss
from rlhf_lightning.rollouts.group_advantages import CriticFree
from tests.ground_truth.plain_loops import LOOPS
from tests.invariance.subjects import SUBJECTS
from tests.methods import EXEMPT, METHODS, PAIR_LOSSES, methods_for
from tests.peers.record import CASES
from tests.precision.methods import METHODS as PRECISION
from tests.resume.runs import NAMES as RESUMED

ROOT = Path(__file__).parents[1]
# Recorded runs of TRL, by the method that they are compared with.
PEERS = {
    "sft": ["sft-llama", "sft-gpt2", "sft-accumulated"],
    "reward model": ["reward-llama", "reward-gpt2"],
    "dpo": ["dpo-llama", "dpo-gpt2", "dpo-at-its-reference", "dpo-smoothed"],
    "ipo": ["ipo-even", "ipo-uneven"],
    "robust dpo": ["robust"],
    "hinge": ["hinge"],
    "nca": ["nca"],
    "simpo": ["simpo"],
    "every pair loss": ["mixed", "exo", "bco", "sppo", "apo-zero", "apo-down", "ld", "wpo", "cpo", "orpo", "alpha"],
    "aot": ["aot"],
    "kto": ["kto-llama", "kto-gpt2", "kto-accumulated"],
    "apo-zero, unpaired": ["apo-zero-unpaired"],
    "ppo": ["ppo-full-llama", "ppo-early"],
    "grpo": ["grpo-llama", "grpo-accumulated"],
    "rloo, sequence ratio": ["rloo", "rloo-accumulated"],
    "dapo": ["dapo", "dapo-accumulated"],
    "gspo": ["gspo"],
    "cispo": ["cispo"],
}
# Kind of test -> the methods that its tests run, as their own lists have them.
RUN = {
    "layout": set(SUBJECTS),
    "precision": set(PRECISION),
    "gradient": set(LOOPS),
    "resume": set(RESUMED.values()),
    "peer": set(PEERS),
}
# Kinds whose tests have no list of their own: they are parametrized with the registry.
PARAMETRIZED = {"two ranks", "memory", "logged mean", "validation"}
# A kind of test that runs no method of a module, and why.
NOT_AT_ALL = {
    ("memory", "RewardModelModule"): "it has no vocabulary",
    ("memory", "ProcessRewardModule"): "it has no vocabulary",
    ("gradient", "PPOModule"): "enumerated in ground_truth/test_gradients.py",
    ("gradient", "GRPOModule"): "enumerated in ground_truth/test_group_gradients.py",
    ("logged mean", "PPOModule"): "an iteration has many optimizer steps",
    ("logged mean", "GRPOModule"): "an iteration has many optimizer steps",
    ("logged mean", "OnlineDPOModule"): "an iteration has many optimizer steps",
    ("peer", "ProcessRewardModule"): "an independent loop in its place",
    ("peer", "OnlineDPOModule"): "an independent loop in its place",
}


def subclasses(kind):
    """All classes below this one that YAML can name, from every file of methods, losses and rollouts."""
    for folder in ("modules", "losses", "rollouts"):
        package = importlib.import_module(f"rlhf_lightning.{folder}")
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(found.name)
    below = [kind]
    for parent in below:
        below.extend(other for other in parent.__subclasses__() if other not in below)
    homes = ("rlhf_lightning.modules", "rlhf_lightning.losses", "rlhf_lightning.rollouts")
    return {
        found
        for found in below[1:]
        if found.__module__.startswith(homes) and not getattr(found, "__abstractmethods__", None)
    }


def test_every_module_of_the_package_is_in_the_registry():
    found = subclasses(LightningModule)
    assert {getattr(modules, name) for name in modules.__all__} == found  # and YAML can name it
    assert found == {method.module for method in METHODS.values()}


@pytest.mark.parametrize("kind", [UnpairedLoss, RankingLoss, ListLoss, LabelledLoss, PolicyLoss, CriticFree])
def test_every_loss_and_baseline_is_that_of_a_method(kind):
    used = {type(value) for method in METHODS.values() for value in method.settings.values()}
    used |= {type(method.settings["objective"].loss) for method in METHODS.values() if "objective" in method.settings}
    assert subclasses(kind) <= used


def test_every_pair_loss_is_that_of_a_method():
    used = {type(loss) for loss in PAIR_LOSSES} | {type(method.settings.get("loss")) for method in METHODS.values()}
    assert subclasses(PairLoss) <= used


def test_every_kind_of_test_is_known():
    assert RUN.keys() | PARAMETRIZED == EXEMPT.keys()
    files = "".join(file.read_text() for file in ROOT.glob("tests/**/*.py") if file.name != "test_methods.py")
    read = set(re.findall(r'methods_for\("([^"]+)"\)|one_of_each_module\("([^"]+)"\)', files))
    assert {name for pair in read for name in pair if name} >= PARAMETRIZED


@pytest.mark.parametrize("kind", RUN)
def test_every_kind_of_test_runs_every_method_that_it_does_not_exempt(kind):
    assert RUN[kind] == set(methods_for(kind))


@pytest.mark.parametrize("kind", EXEMPT)
def test_an_exemption_has_a_reason_and_leaves_one_method_of_each_module(kind):
    assert EXEMPT[kind].keys() <= METHODS.keys()
    assert all(len(reason) > 10 for reason in EXEMPT[kind].values())
    run = {METHODS[name].module.__name__ for name in methods_for(kind)}
    missing = {method.module.__name__ for method in METHODS.values()} - run
    assert missing == {module for other, module in NOT_AT_ALL if other == kind}


def test_the_recorded_runs_of_peers_exist():
    recorded = {case for cases in CASES.values() for case in cases}
    assert {case for cases in PEERS.values() for case in cases} <= recorded
