"""RLOO, REINFORCE, REINFORCE++, ReMax and GRPO: their own code's expected update against the gradient of the objective.

Convergence cannot see 1/length weights or a standard deviation, for all advantages vanish at the optimum: this can.
"""

from dataclasses import replace

import pytest
from enumeration import NOISE, Recorder, direction_error

from rlhf_lightning.evaluation.exact import target_of
from rlhf_lightning.evaluation.gradients import flat_gradient, group_update, perturb
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.losses import CISPOLoss, ClippedLoss, PolicyObjective, ReinforceLoss, SequenceClippedLoss
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import GRPOModule
from rlhf_lightning.modules.grpo_update import Groups, GRPOUpdate
from rlhf_lightning.rewards.enumerable import EnumerableReward
from rlhf_lightning.rollouts.group_advantages import BatchMean, GreedyBaseline, GroupMean, LeaveOneOut, ReturnToGo
from rlhf_lightning.rollouts.kl_control import FixedKL
from rlhf_lightning.worlds import EnumerableWorld

EXACT, WRONG = 1e-5, 1e-2
EXACT_ESTIMATORS = [LeaveOneOut(), GroupMean(scale="none"), BatchMean(), GreedyBaseline(), ReturnToGo(whiten=False)]


@pytest.fixture(scope="module")
def single():
    """Responses of one token."""
    return EnumerableWorld(seed=0, max_new_tokens=1, preferences=256, prompt_rows=8, held_out=4)


def error(world, advantages, objective, folder, beta_times=1.0):
    """Distance in direction between the module's expected update and minus the exact gradient."""
    module = GRPOModule(
        ModelSpec(path=folder),
        EnumerableReward(world),
        advantages,
        objective,
        FixedKL(0.7),
        groups=Groups(size=2),
        sampling=SamplingParameters(world.max_new_tokens),
        update=GRPOUpdate(micro_batch_size=10**6),
        optimizer=Recorder,
    )
    module.configure_model()
    plain = replace(objective, aggregation="sequence_sum", loss=ReinforceLoss())
    module.objective, module.advantages = plain, LeaveOneOut()  # whose optimum is known
    target = target_of(module, world)
    target = replace(target, beta=beta_times * target.beta)
    module.objective, module.advantages = objective, advantages
    policy = module.policy.network
    perturb(policy, NOISE)
    weights = list(policy.parameters())
    exact = -target.objective(world.logps(policy)).mean()
    return direction_error(flat_gradient(group_update(module, world), weights), flat_gradient(exact, weights))


def reward_k1(aggregation="sequence_sum", loss=None):
    return PolicyObjective(aggregation, "reward_k1", loss or ReinforceLoss())


@pytest.mark.parametrize("advantages", EXACT_ESTIMATORS, ids=lambda estimator: type(estimator).__name__)
def test_every_baseline_gives_the_gradient_of_the_objective(world, folder, advantages):
    assert error(world, advantages, reward_k1(), folder) < EXACT


@pytest.mark.parametrize(
    "loss",
    [ClippedLoss(), CISPOLoss(), SequenceClippedLoss(length_normalised=False)],
    ids=lambda loss: type(loss).__name__,
)
def test_on_fresh_responses_every_loss_is_reinforce(world, folder, loss):
    # A ratio of the whole response is shared by its tokens, so that their mean is the response's.
    how = "sequence_mean" if isinstance(loss, SequenceClippedLoss) else "sequence_sum"
    assert error(world, LeaveOneOut(), reward_k1(how, loss), folder) < EXACT


def test_the_constant_length_of_dr_grpo_is_a_constant(world, folder):
    assert error(world, GroupMean(scale="none"), reward_k1("constant_length"), folder) < EXACT


@pytest.mark.parametrize("advantages", [LeaveOneOut(), ReturnToGo(whiten=False)], ids=lambda x: type(x).__name__)
def test_half_the_squared_log_ratio_of_the_response_in_the_loss_is_as_good(world, folder, advantages):
    found = error(world, advantages, PolicyObjective("sequence_sum", "loss_k2_sequence", ReinforceLoss()), folder)
    assert found < EXACT


@pytest.mark.parametrize(
    "advantages",
    [GroupMean(scale="none"), ReturnToGo(whiten=False, group_baseline=True)],
    ids=lambda x: type(x).__name__,
)
def test_a_mean_that_counts_the_response_itself_leaves_less_of_its_reward(world, folder, advantages):
    """With two responses half of it, beside a KL that stays whole: the gradient of another objective, of twice the beta."""
    objective = PolicyObjective("sequence_sum", "loss_k2_sequence", ReinforceLoss())
    if isinstance(advantages, ReturnToGo):
        objective = reward_k1()
    assert error(world, advantages, objective, folder) > WRONG
    assert error(world, advantages, objective, folder, beta_times=2.0) < EXACT


def test_k3_in_the_loss_is_the_other_kl(single, folder_of_one):
    k3 = PolicyObjective("sequence_sum", "loss_k3_token", ReinforceLoss())
    assert error(single, BatchMean(), k3, folder_of_one) < EXACT


@pytest.fixture(scope="module")
def folder_of_one(single, tmp_path_factory):
    return str(export_folder(single.reference(), single.tokenizer(), tmp_path_factory.mktemp("one") / "reference"))


@pytest.mark.parametrize("aggregation", ["sequence_mean"])
def test_one_over_the_length_is_another_gradient(world, folder, aggregation):
    """GRPO's own aggregation."""
    assert error(world, LeaveOneOut(), reward_k1(aggregation), folder) > WRONG


def test_the_standard_deviation_is_another_gradient(world, folder):
    assert error(world, GroupMean(), reward_k1(), folder) > WRONG


def test_cut_off_responses_that_teach_nothing_are_another_gradient(world, folder, monkeypatch):
    monkeypatch.setattr(GRPOModule, "_counted", lambda self, rows: rows.response_mask & ~rows.truncated[:, None])
    assert error(world, LeaveOneOut(), reward_k1(), folder) > WRONG
