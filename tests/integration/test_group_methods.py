"""GRPO, its relatives and online DPO under a real Trainer: they learn, they say what is wrong, they count what happens."""

import logging

import lightning.pytorch as pl
import pytest
import torch

from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.splits import Split
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.losses import (
    CISPOLoss,
    ClippedLoss,
    DPOLoss,
    PolicyObjective,
    ReinforceLoss,
    SequenceClippedLoss,
    SimPOLoss,
)
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import GRPOModule, OnlineDPOModule
from rlhf_lightning.modules.grpo_update import Groups, GRPOUpdate
from rlhf_lightning.modules.optimization import Schedule
from rlhf_lightning.modules.rollout_metrics import evaluation_counts
from rlhf_lightning.rewards.composite import WeightedRewards
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.rewards.judge import FunctionJudge, WinRateReward
from rlhf_lightning.rollouts.group_advantages import BatchMean, GreedyBaseline, GroupMean, LeaveOneOut, ReturnToGo
from rlhf_lightning.rollouts.kl_control import FixedKL
from rlhf_lightning.worlds import world_tokenizer
from tests.faults.faulty import Rows
from tests.invariance.subjects import Memory

WORDS = SamplingParameters(max_new_tokens=6)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    torch.manual_seed(0)
    fields = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    network = load_causal_lm(ModelSpec(architecture={"model_type": "llama", **fields}), world_tokenizer())
    return ModelSpec(path=str(export_folder(network, world_tokenizer(), tmp_path_factory.mktemp("base") / "policy")))


def count_green(completions):
    return [c[0]["content"].split().count("green") for c in completions]


def adam(params):
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0)


def grpo(policy, advantages, objective, *, reward=count_green, kl=0.0, groups=None, **update):
    settings = {"minibatch_size": 64, **update}
    return GRPOModule(
        policy,
        FunctionReward(reward),
        advantages,
        objective,
        kl=FixedKL(kl),
        groups=groups or Groups(size=4),
        sampling=WORDS,
        update=GRPOUpdate(**settings),
        optimizer=adam,
        schedule=Schedule(decay="constant"),
    )


def fit(module, folder, iterations, prompts=16, **trainer):
    pl.seed_everything(0, verbose=False)
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings |= {"enable_checkpointing": False, "default_root_dir": folder, "num_sanity_val_steps": 0, "max_epochs": -1}
    runner = pl.Trainer(max_steps=iterations, **settings | trainer)
    runner.fit(module, datamodule=PromptDataModule(Rows(), batch_size=prompts, split=Split(validation=0)))
    return runner


METHODS = {
    "rloo": (LeaveOneOut(), PolicyObjective("sequence_sum", "reward_k1", ReinforceLoss())),
    "reinforce": (BatchMean(), PolicyObjective("sequence_sum", "reward_k1", ReinforceLoss())),
    "reinforce++": (ReturnToGo(), PolicyObjective("token_mean", "reward_k1", ClippedLoss())),
    "remax": (GreedyBaseline(), PolicyObjective("sequence_sum", "reward_k1", ReinforceLoss())),
    "grpo": (GroupMean(), PolicyObjective("sequence_mean", "loss_k3_token")),
    "gspo": (GroupMean(), PolicyObjective("sequence_mean", "loss_k3_token", SequenceClippedLoss())),
    "cispo": (GroupMean(), PolicyObjective("token_mean", "loss_k3_token", CISPOLoss())),
}


@pytest.mark.parametrize("method", METHODS)
def test_each_learns_to_emit_a_token(policy, tmp_path, method):
    """Reward is how often "green" is said; at random it is said 6 / 142 times in six words."""
    module = grpo(policy, *METHODS[method], kl=0.001)
    fit(module, tmp_path, 40)
    assert module.drawn.scores.mean() > 2
    assert (module.iteration, module.episodes) == (40, 40 * 64)


@pytest.mark.parametrize("kind", ["reward", "judge", "reference-free"])
def test_online_dpo_learns_to_emit_a_token(policy, tmp_path, kind):
    def more_green(prompts, first, second):
        return [
            0.5 + 0.5 * ((a := x.split().count("green")) > (b := y.split().count("green"))) - 0.5 * (a < b)
            for x, y in zip(first, second, strict=True)
        ]

    reward = WinRateReward(FunctionJudge(more_green)) if kind == "judge" else FunctionReward(count_green)
    loss = SimPOLoss(beta=2.0) if kind == "reference-free" else DPOLoss(beta=0.1)
    update = GRPOUpdate(minibatch_size=32)
    module = OnlineDPOModule(policy, reward, loss, Groups(size=4), WORDS, update, adam, Schedule(decay="constant"))
    fit(module, tmp_path, 60)
    said = [text.split().count("green") for text in module.last_rollout[0].samples.completions]
    assert sum(said) / len(said) > 0.4  # ten times as often
    assert (module.reference is None) == (kind == "reference-free")


def test_pairs_are_the_best_and_the_worst_and_a_tie_teaches_nothing(policy, tmp_path):
    module = OnlineDPOModule(
        policy, FunctionReward(count_green), groups=Groups(size=3), update=GRPOUpdate(minibatch_size=8)
    )
    seen = {}
    module._learn = lambda pairs: seen.update(pairs=pairs)
    module._finish = lambda rollout: seen.update(rollout=rollout)
    score = module._score

    def told(responses, scores):
        rollout = score(responses, scores)
        scores = torch.tensor([1.0, 5.0, 3.0, 2.0, 2.0, 2.0, 9.0, 0.0, 4.0])
        truncated = torch.tensor([False, False, False, False, False, False, True, False, False])
        return type(rollout)(**{**vars(rollout), "scores": scores, "truncated": truncated})

    module._score = told
    fit(module, tmp_path, 1, prompts=3, limit_train_batches=1, max_epochs=1)  # no step is taken
    pairs = seen["pairs"]
    assert pairs.groups.tolist() == [0, 0, 1, 1, 2, 2]
    assert pairs.scores.tolist()[:2] == [5.0, 1.0]
    assert pairs.scores.tolist()[4:] == [4.0, 9.0]  # what has no end loses, whatever its score
    assert pairs.advantages[:, 0].tolist() == [1, 1, 0, 0, 1, 1]


def test_a_constant_reward_is_warned_about_once_and_counted(policy, tmp_path, caplog):
    module = grpo(policy, *METHODS["grpo"], reward=lambda prompts: [0.5] * len(prompts))
    before = {}
    module.on_train_start = lambda: before.update({k: v.clone() for k, v in module.policy.state_dict().items()})
    with caplog.at_level(logging.WARNING):
        fit(module, tmp_path, 3)
    assert module.without_signal == 3
    assert sum("nothing is learnt" in record.message for record in caplog.records) == 1
    assert all(torch.equal(before[k], v) for k, v in module.policy.state_dict().items())


def test_dynamic_sampling_learns_from_prompts_whose_responses_differ(policy, tmp_path):
    """Half of the prompts always score one thing; of the others, as many as were asked for are learnt from."""
    module = grpo(
        policy,
        *METHODS["grpo"],
        reward=lambda prompts, completion_ids: [
            float(sum(ids)) if len(str(p)) % 2 else 1.0 for p, ids in zip(prompts, completion_ids, strict=True)
        ],
        groups=Groups(size=4, prompts=4),
        minibatch_size=16,
    )
    fit(module, tmp_path, 2)
    prompts = module.drawn.responses.samples.prompts
    assert len(prompts) == 16
    assert all(len(str(prompt)) % 2 for prompt in prompts)
    assert 4 <= module.drawn.prompts <= 16


def test_no_reference_is_loaded_for_a_kl_without_weight(policy, tmp_path):
    module = grpo(policy, *METHODS["grpo"], kl=0.0)
    fit(module, tmp_path, 1)
    assert module.reference is None
    held = grpo(policy, *METHODS["grpo"], kl=0.1)
    fit(held, tmp_path, 1)
    assert held.reference is not None


def test_without_a_reference_nothing_is_said_of_the_kl(policy, tmp_path):
    logged = {}
    for name, loss in (("with", DPOLoss()), ("without", SimPOLoss())):
        update = GRPOUpdate(minibatch_size=32)
        module = OnlineDPOModule(policy, FunctionReward(count_green), loss, Groups(size=2), WORDS, update, adam)
        memory = Memory()
        fit(module, tmp_path, 1, prompts=8, logger=memory)
        responses, scores = module.last_rollout
        shown = {} if module.reference else evaluation_counts("sampled", responses, scores, None)
        logged[name] = {key for row in memory.rows for key in row} | set(shown)
    assert "train/objective/kl" in logged["with"]
    assert not any("kl" in key or "rlhf_reward" in key for key in logged["without"])
    assert {"train/objective/scores", "sampled/score"} <= logged["without"]


@pytest.mark.parametrize("epochs", [1, 3])
def test_staleness_counts_the_steps_since_the_responses_were_drawn(policy, tmp_path, epochs):
    module = grpo(policy, *METHODS["grpo"], minibatch_size=32, epochs=epochs)
    logged = []
    drain = module.update_means.drain
    module.update_means.drain = lambda: logged.append(drain()) or logged[-1]
    fit(module, tmp_path, 2 * epochs)
    assert float(logged[0]["staleness"]) == pytest.approx((2 * epochs - 1) / 2)


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ({"advantages": LeaveOneOut(), "groups": Groups(size=1)}, "groups.size 1 leaves none"),
        ({"advantages": GroupMean(), "groups": Groups(size=1)}, "groups.size 1 leaves none"),
        ({"advantages": BatchMean(), "groups": Groups(size=1, prompts=2)}, "groups.size must be 2 or more"),
        ({"advantages": GroupMean(), "groups": Groups(size=3)}, "no multiple of groups.size 3"),
    ],
)
def test_groups_that_are_none(policy, what, match):
    with pytest.raises(UserError, match=match):
        grpo(policy, what["advantages"], METHODS["grpo"][1], groups=what["groups"])


@pytest.mark.parametrize(
    ("groups", "update", "match"),
    [
        (Groups(size=1), GRPOUpdate(), "makes no pair"),
        (Groups(size=2), GRPOUpdate(minibatch_size=3), "make them even"),
        (Groups(size=2, prompts=1), GRPOUpdate(), "leave them out"),
    ],
)
def test_pairs_that_are_none(policy, groups, update, match):
    with pytest.raises(UserError, match=match):
        OnlineDPOModule(policy, FunctionReward(count_green), groups=groups, update=update)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ClippedLoss(clip_low=0.0), "clip_low"),
        (lambda: ClippedLoss(clip_high=0.0), "clip_high"),
        (lambda: ClippedLoss(ratio_cap=1.1), "above 1 \\+ clip_high"),
        (lambda: SequenceClippedLoss(clip_low=1.0), "clip_low"),
        (lambda: CISPOLoss(ratio_cap=0.2), "the greatest ratio itself"),
        (lambda: PolicyObjective("token_mean", "reward_k1", entropy_coef=-1.0), "entropy_coef"),
        (lambda: Groups(size=0), "at least 1"),
        (lambda: GRPOUpdate(epochs=0), "at least 1"),
    ],
)
def test_senseless_coefficients(make, match):
    with pytest.raises(UserError, match=match):
        make()


def test_signal_is_judged_by_the_scores_that_advantages_are_made_of(policy, tmp_path, caplog):
    """All scores lie above the clip: the raw ones differ, and still nothing is learnt."""
    module = grpo(
        policy,
        GroupMean(score_clip=1.0),
        METHODS["grpo"][1],
        reward=lambda completion_ids: [1.0 + sum(x) for x in completion_ids],
    )
    memory = Memory()
    with caplog.at_level(logging.WARNING):
        fit(module, tmp_path, 1, logger=memory)
    assert module.without_signal == 1
    assert memory.rows[0]["train/frac_reward_zero_std"] == 1.0
    assert memory.rows[0]["train/reward_std"] > 0  # that of the rewards as they were given
    assert "nothing is learnt" in caplog.text


def test_a_group_of_responses_that_are_all_masked_has_no_signal(policy):
    module = grpo(policy, *METHODS["grpo"], groups=Groups(size=2, mask_truncated=True))
    scores = torch.tensor([1.0, 2.0, 1.0, 2.0, 3.0, 3.0])
    truncated = torch.tensor([True, True, True, False, False, False])
    judged = module._judged(scores, truncated).view(3, 2)
    assert (judged[:, 0] == judged[:, 1]).tolist() == [True, False, True]


def test_pairs_by_truncation_alone_are_counted_as_a_signal(policy, tmp_path, caplog):
    """A response without an end loses to one with an end, though both have the same score."""
    shares = {}
    for name, sampling in (
        ("mixed", SamplingParameters(max_new_tokens=30)),
        ("cut", SamplingParameters(max_new_tokens=1)),
    ):
        reward = FunctionReward(lambda prompts: [0.5] * len(prompts))
        module = OnlineDPOModule(policy, reward, groups=Groups(size=8), sampling=sampling, optimizer=adam)
        memory = Memory()
        with caplog.at_level(logging.WARNING):
            fit(module, tmp_path, 1, prompts=8, logger=memory)
        truncated = module.last_rollout[0].truncated.view(8, 8)
        mixed = truncated.any(1) & ~truncated.all(1)
        assert memory.rows[0]["train/frac_reward_zero_std"] == pytest.approx(1 - mixed.float().mean())
        shares[name] = (memory.rows[0]["train/frac_reward_zero_std"], module.without_signal)
    assert shares["mixed"][0] < 1
    assert shares["mixed"][1] == 0
    assert shares["cut"] == (1.0, 1)
    assert caplog.text.count("nothing is learnt") == 1


@pytest.mark.parametrize(
    ("method", "groups", "mean"),
    [
        ("remax", Groups(size=1), 0.0),  # four prompts, then their greedy responses
        ("grpo", Groups(size=2, prompts=3), 0.25),  # three prompts that agree, then the fourth
    ],
)
def test_parts_of_a_reward_are_means_over_all_that_was_drawn_to_be_learnt_from(policy, tmp_path, method, groups, mean):
    calls = []

    def number_of_the_call(prompts):
        calls.append(len(prompts))
        return [len(calls) - 1.0] * len(prompts)

    module = grpo(policy, *METHODS[method], groups=groups)
    module.reward = module.scorer.reward = WeightedRewards([FunctionReward(number_of_the_call)])
    memory = Memory()
    fit(module, tmp_path, 1, prompts=4, logger=memory)
    assert len(calls) == 2
    assert memory.rows[0]["train/rewards/number_of_the_call/mean"] == pytest.approx(mean)
