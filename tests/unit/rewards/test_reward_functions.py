"""Plain functions as rewards: what they are given, what they may give back, and where they are found."""

import asyncio
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import TrainerState

from rlhf_lightning.errors import UserError
from rlhf_lightning.modules.rollout_metrics import part_means
from rlhf_lightning.rewards.composite import WeightedRewards
from rlhf_lightning.rewards.failures import GuardedReward, RewardFailures
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.rewards.reward import Reward, Samples, applicable_scores, checked_scores
from rlhf_lightning.rewards.rules import FormatReward, LengthReward, OverlongPenalty

CHAT = [{"role": "user", "content": "why"}]
SAMPLES = Samples(
    prompts=["one", CHAT],
    completions=["yes", "no, never"],
    completion_ids=[[5, 2], [6, 7, 8]],
    truncated=[False, True],
    columns={"answer": ["yes", "no"]},
)


def length(completions, **kwargs):
    return [float(len(c if isinstance(c, str) else c[0]["content"])) for c in completions]


def test_a_function_with_kwargs_is_given_everything():
    seen = {}

    def reward(**kwargs):
        seen.update(kwargs)
        return [1, 2.5]

    assert FunctionReward(reward).score(SAMPLES).tolist() == [1.0, 2.5]
    assert seen.pop("trainer_state").global_step == 0
    assert callable(seen.pop("log_extra"))
    assert callable(seen.pop("log_metric"))
    assert seen == {
        "prompts": ["one", CHAT],
        "completions": ["yes", [{"role": "assistant", "content": "no, never"}]],
        "completion_ids": [[5, 2], [6, 7, 8]],
        "answer": ["yes", "no"],
    }


def test_a_function_is_given_only_what_it_names():
    def equal(completions, answer):
        return [
            float((c if isinstance(c, str) else c[0]["content"]) == a) for c, a in zip(completions, answer, strict=True)
        ]

    reward = FunctionReward(equal)
    assert reward.name == "equal"
    assert reward.score(SAMPLES).tolist() == [1.0, 0.0]
    assert FunctionReward(lambda completion_ids: [len(i) for i in completion_ids]).score(SAMPLES).tolist() == [2.0, 3.0]


def test_a_tensor_or_a_tuple_may_come_back():
    assert checked_scores(FunctionReward(lambda prompts: torch.tensor([1, 2])), SAMPLES).tolist() == [1.0, 2.0]
    assert checked_scores(FunctionReward(lambda prompts: (True, 0)), SAMPLES).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("result", "complaint"),
    [
        ([1.0], r"shape \(1,\) for 2 samples"),
        ([1.0, 2.0, 3.0], r"shape \(3,\) for 2 samples"),
        (torch.zeros(2, 1), r"shape \(2, 1\) for 2 samples"),
        ([0.0, float("nan")], "nan for 1 of 2 samples.*'no, never'"),
        ([float("inf"), 0.0], "inf for 1 of 2 samples.*'yes'"),
        ([0.0, None], "does not apply to 1 of 2 samples, first to the response 'no, never'"),
        (["good", 0.0], "not a number"),
        ([[1.0], [2.0]], "not a number"),
        (None, "NoneType"),
        (1.0, "float"),
        ("ab", "str"),
        ({"a": 1.0, "b": 2.0}, "dict"),
    ],
)
def test_what_is_not_one_number_a_response_is_refused_and_the_function_named(result, complaint):
    def my_reward(prompts):
        return result

    with pytest.raises(UserError, match=f"^my_reward .*{complaint}"):
        checked_scores(FunctionReward(my_reward), SAMPLES)


def test_a_function_is_found_in_a_file(tmp_path):
    file = tmp_path / "some_rewards_of_mine.py"
    file.write_text("def short(completions):\n    return [-float(len(c)) for c in completions]\n\nnumber = 3\n")
    reward = FunctionReward(f"{file}:short")
    assert reward.name == "short"
    assert reward.score(SAMPLES).tolist() == [-3.0, -1.0]
    with pytest.raises(UserError, match="no function 'long'"):
        FunctionReward(f"{file}:long")
    with pytest.raises(UserError, match="no function 'number'"):
        FunctionReward(f"{file}:number")
    with pytest.raises(UserError, match=r"none\.py does not exist"):
        FunctionReward(f"{tmp_path}/none.py:short")


def test_a_function_is_found_in_a_module():
    assert FunctionReward("statistics.fmean").name == "fmean"
    for where, complaint in [
        ("statistics.nothing", "no function 'nothing'"),
        ("no_such_package.f", "no_such_package"),
        ("alone", "names no function"),
    ]:
        with pytest.raises(UserError, match=complaint):
            FunctionReward(where)


class Constant(Reward):
    def __init__(self, value):
        self.value, self.device = value, None

    def prepare(self, device):
        self.device = device

    def score(self, samples):
        return torch.full((len(samples.prompts),), self.value)


def test_weighted_rewards_add_up_and_keep_their_parts_apart():
    parts = [Constant(2.0), FunctionReward(length), Constant(-1.0)]
    reward = WeightedRewards(parts, weights=[0.5, 2.0, 3.0])
    assert checked_scores(reward, SAMPLES).tolist() == [0.5 * 2 + 2 * 3 - 3, 0.5 * 2 + 2 * 9 - 3]
    by_name = {name: scores.tolist() for name, scores in reward.parts().items()}
    assert by_name["Constant"] == [2.0, 2.0]
    assert by_name["length"] == [3.0, 9.0]
    assert sorted(by_name.values()) == [[-1.0, -1.0], [2.0, 2.0], [3.0, 9.0]]
    reward.prepare("cpu")
    assert parts[0].device == parts[2].device == "cpu"
    assert WeightedRewards(parts).score(SAMPLES).tolist() == [4.0, 10.0]


def test_a_bad_part_is_named_and_weights_have_to_match():
    with pytest.raises(UserError, match=r"^Constant returned nan"):
        WeightedRewards([Constant(1.0), Constant(float("nan"))]).score(SAMPLES)
    with pytest.raises(UserError, match="1 rewards and 2 weights"):
        WeightedRewards([Constant(1.0)], weights=[1.0, 2.0])
    with pytest.raises(UserError, match="0 rewards"):
        WeightedRewards([])


def test_a_function_that_needs_a_column_which_is_not_there_says_so():
    def needs_truth(completions, ground_truth):
        return [0.0 for _ in completions]

    with pytest.raises(UserError, match="needs_truth needs ground_truth"):
        FunctionReward(needs_truth).score(Samples(["a"], ["b"], [[1]], [False]))


def test_what_a_sum_of_rewards_was_made_of_can_be_logged():
    def long(completions):
        return [float(len(text)) for text in completions]

    both = WeightedRewards([FunctionReward(long), FunctionReward(long)], [1.0, -0.5])
    scores = both.score(Samples(["a", "a"], ["bb", "bbbb"], [[1], [1]], [False, False]))
    assert scores.tolist() == [1.0, 2.0]
    assert {name: part.tolist() for name, part in both.parts().items()} == {"long": [2.0, 4.0], "long_1": [2.0, 4.0]}


def applies_to(*indices):
    def rule(prompts):
        return [float(i + 1) if i in indices else None for i in range(len(prompts))]

    return FunctionReward(rule)


def test_what_does_not_apply_adds_nothing_and_is_not_counted():
    both = WeightedRewards([applies_to(0, 1), applies_to(1)], [1.0, 10.0])
    scores, applies = applicable_scores(both, SAMPLES)
    assert (scores.tolist(), applies.tolist()) == ([1.0, 22.0], [True, True])
    assert checked_scores(both, SAMPLES).tolist() == [1.0, 22.0]
    means = part_means(both.parts(), lambda x: x, torch.device("cpu"))
    assert {name: mean.item() for name, mean in means.items()} == {"rewards/rule/mean": 1.5, "rewards/rule_1/mean": 2.0}
    # Two ranks, on the other of which the second applies to one sample of value 4.
    other = iter([torch.tensor([3.0, 2.0]), torch.tensor([4.0, 1.0])])
    means = part_means(both.parts(), lambda x: x + next(other), torch.device("cpu"))
    assert [mean.item() for mean in means.values()] == [1.5, 3.0]


def test_a_sample_to_which_nothing_applies_is_an_error_unless_the_whole_has_a_score_for_it():
    none_for_the_second = WeightedRewards([applies_to(0), applies_to()])
    assert none_for_the_second.score(SAMPLES) == [1.0, None]
    with pytest.raises(
        UserError, match="WeightedRewards does not apply to 1 of 2 samples, first to the response 'no, never'"
    ):
        checked_scores(none_for_the_second, SAMPLES)
    assert checked_scores(WeightedRewards([none_for_the_second, applies_to(1)]), SAMPLES).tolist() == [1.0, 2.0]
    means = part_means(none_for_the_second.parts(), lambda x: x, torch.device("cpu"))
    assert means["rewards/rule_1/mean"].isnan()


async def asked_elsewhere(completions, answer):
    await asyncio.sleep(0.2)
    return [None if truth == "no" else 1.0 for truth in answer]


def test_async_functions_are_awaited_with_an_event_loop_running_and_without():
    reward = FunctionReward(asked_elsewhere)
    assert reward.score(SAMPLES) == [1.0, None]

    async def in_a_notebook():
        return reward.score(SAMPLES)

    assert asyncio.run(in_a_notebook()) == [1.0, None]


def test_rewards_that_wait_are_scored_at_the_same_time_and_the_others_in_this_thread():
    together = threading.Barrier(2, timeout=120)

    async def waits(prompts):
        together.wait()  # passed only if both are under way
        return [1.0] * len(prompts)

    threads = []

    def stays(prompts):
        threads.append(threading.current_thread())
        return [5.0] * len(prompts)

    both = WeightedRewards([FunctionReward(waits), FunctionReward(stays), FunctionReward(waits)], [1.0, 1.0, 10.0])
    assert both.score(SAMPLES).tolist() == [16.0, 16.0]
    assert [part.tolist()[0] for part in both.parts().values()] == [1.0, 5.0, 1.0]
    assert threads == [threading.current_thread()]


def test_an_error_of_a_reward_that_waits_is_not_lost():
    async def breaks(prompts):
        raise UserError("the judge is asleep")

    with pytest.raises(UserError, match="asleep"):
        WeightedRewards([Constant(1.0), FunctionReward(breaks)]).score(SAMPLES)


@pytest.mark.parametrize(
    "result",
    [
        np.array([1.0, 2.5]),
        np.array([1, 2], dtype=np.int64),
        np.array([True, False]),
        np.array([1.0, 2.5], dtype=np.float16),
        [np.float32(1.0), np.float64(2.5)],
        [torch.tensor(1.0), 2.5],
        map(float, [1, 2]),
        range(2),
    ],
    ids=["floats", "integers", "bools", "float16", "numpy scalars", "a tensor", "map", "range"],
)
def test_arrays_and_whatever_can_be_gone_through_may_come_back(result):
    expected = [float(x) for x in (list(result) if not isinstance(result, map) else [1, 2])]
    scores = checked_scores(FunctionReward(lambda prompts: result), SAMPLES)
    assert scores.tolist() == expected
    assert scores.dtype == torch.float32


def test_a_generator_function_may_yield_its_scores():
    def one_by_one(completion_ids):
        for ids in completion_ids:
            yield len(ids) if len(ids) > 2 else None

    assert FunctionReward(one_by_one).score(SAMPLES) == [None, 3.0]
    objects = FunctionReward(lambda prompts: np.array([1.0, None], dtype=object))
    assert objects.score(SAMPLES) == [1.0, None]


@pytest.mark.parametrize(
    ("result", "complaint"),
    [
        (np.zeros((2, 1)), r"shape \(2, 1\)"),
        (np.array(1.0), "ndarray; return a list"),
        (np.array([1.0, np.nan]), "nan for 1 of 2"),
        (np.array(["a", "b"]), "not a number"),
        ({1.0, 2.0}, "set; return a list"),
        (b"ab", "bytes; return a list"),
        ((x for x in [1.0]), r"shape \(1,\) for 2"),
    ],
)
def test_other_results_are_refused(result, complaint):
    with pytest.raises(UserError, match=complaint):
        checked_scores(FunctionReward(lambda prompts: result), SAMPLES)


def test_a_function_learns_where_the_training_is():
    def later(prompts, trainer_state):
        return [trainer_state.global_step / trainer_state.max_steps] * len(prompts)

    reward = WeightedRewards([FunctionReward(length), FunctionReward(later)], [0.0, 1.0])
    assert reward.reads_trainer_state
    assert not FunctionReward(length_alone).reads_trainer_state
    assert reward.score(SAMPLES).tolist() == [0.0, 0.0]  # outside of a training
    reward.set_trainer_state(TrainerState(global_step=3, max_steps=4))
    assert reward.score(SAMPLES).tolist() == [0.75, 0.75]


def length_alone(completions):
    return [1.0] * len(completions)


def logging(prompts, completions, log_extra, log_metric):
    log_extra("first", [str(c)[:1] for c in completions])
    log_metric("accuracy", 0.25)
    log_metric("accuracy", np.float32(0.75))
    return [1.0, 2.0]


def test_metrics_and_columns_that_a_function_logs_are_kept():
    samples = replace(SAMPLES, extra={})
    reward = WeightedRewards([FunctionReward(length_alone), FunctionReward(logging), FunctionReward(logging)])
    checked_scores(reward, samples)
    assert samples.extra == {"first": ["y", "["]}
    assert samples.rows([1, 0, 1]).extra == {"first": ["[", "y", "["]}
    assert reward.logs_metrics
    assert reward.logged_metrics() == {"accuracy": [0.25, 0.75, 0.25, 0.75]}
    guarded = GuardedReward(reward, RewardFailures(), lambda x: x)
    guarded.during(1).score(samples)
    assert guarded.logged_metrics() == {"accuracy": [0.25, 0.75, 0.25, 0.75]}
    assert guarded.logged_metrics() == {}


@pytest.mark.parametrize(
    ("log", "complaint"),
    [
        (lambda log_extra, log_metric: log_extra("x", [1]), r"log_extra\('x'\) got 1 values for 2 responses"),
        (lambda log_extra, log_metric: log_metric("x", "high"), r"log_metric\('x'\) needs a number"),
        (lambda log_extra, log_metric: log_metric("x", None), r"log_metric\('x'\) needs a number"),
    ],
)
def test_what_can_not_be_logged_is_refused_and_the_function_named(log, complaint):
    def my_reward(prompts, log_extra, log_metric):
        log(log_extra, log_metric)
        return [1.0, 2.0]

    with pytest.raises(UserError, match=f"^my_reward: {complaint}"):
        FunctionReward(my_reward).score(replace(SAMPLES, extra={}))


def test_log_extra_may_be_called_part_by_part():
    def my_reward(prompts, log_extra):
        for i in range(len(prompts)):
            log_extra("index", [i])
        return [1.0, 2.0]

    samples = replace(SAMPLES, extra={})
    FunctionReward(my_reward).score(samples)
    assert samples.extra == {"index": [0, 1]}


WORDS = {2: "<end>", 5: "yes", 6: "<think>", 7: "never", 8: "</think>"}
TAGGED = Samples(
    ["one", CHAT],
    ["yes", "never"],
    [[5, 2], [6, 7, 8]],
    [False, True],
    dropped_tokens=("<think>", "</think>"),
    decode=lambda rows: ["".join(WORDS[i] for i in row) for row in rows],
)


def test_special_tokens_are_kept_on_request():
    seen = []

    def look(completions):
        seen.append(completions)
        return [0.0, 0.0]

    FunctionReward(look).score(TAGGED)
    FunctionReward(look, skip_special_tokens=False).score(TAGGED)
    assert seen[0] == ["yes", [{"role": "assistant", "content": "never"}]]
    assert seen[1] == ["yes<end>", [{"role": "assistant", "content": "<think>never</think>"}]]
    tags = {"pattern": "<think>.*</think>", "skip_special_tokens": False}
    assert FormatReward(**tags).score(TAGGED) == [0.0, 1.0]
    with pytest.raises(UserError, match="text alone"):
        FunctionReward(look, skip_special_tokens=False).score(SAMPLES)


@pytest.mark.parametrize(
    ("reward", "names"),
    [
        (FunctionReward(length_alone), ["length_alone"]),
        (WeightedRewards([FunctionReward(length_alone), FormatReward()]), ["length_alone", "FormatReward"]),
        (Constant(1.0), ["Constant"]),
        (FunctionReward(length_alone, skip_special_tokens=False), []),
        (FunctionReward(lambda completion_ids: [1.0, 2.0]), []),
        (OverlongPenalty(4, 2), []),
        (LengthReward(most=3), []),
    ],
)
def test_a_reward_that_does_not_see_all_that_was_sampled_is_named_once(reward, names, caplog):
    for _ in range(2):
        checked_scores(reward, TAGGED)
    assert [record.args[0] for record in caplog.records] == names
    assert all("'<think>', '</think>'" in record.message for record in caplog.records)
    checked_scores(FunctionReward(length_alone), replace(TAGGED, dropped_tokens=()))
    assert len(caplog.records) == len(names)
