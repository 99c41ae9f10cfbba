"""Tasks of reasoning-gym: prompts from a seed, and verdicts in a sandbox."""

import json
from importlib.util import find_spec

import pytest

from rlhf_lightning.data.seeds import mixed_seed
from rlhf_lightning.errors import UserError
from rlhf_lightning.rewards import ReasoningGymReward, ReasoningGymSource
from rlhf_lightning.rewards.reasoning import COLUMN
from rlhf_lightning.rewards.reward import Samples, checked_scores
from rlhf_lightning.rewards.sandbox import Sandbox

pytestmark = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="needs the extra 'reasoning'")
TASKS = {"chain_sum": {"min_terms": 2, "max_terms": 2}, "countdown": {}}


@pytest.fixture(scope="module")
def rows():
    return ReasoningGymSource(TASKS, size=3, validation=2, seed=5).load("prompts")


def samples(rows, completions):
    n = len(completions)
    return Samples(rows["prompt"][:n], completions, [[1]] * n, [False] * n, {COLUMN: rows[COLUMN][:n]})


def test_prompts_come_from_the_seed_and_validation_has_others(rows):
    assert {name: len(split) for name, split in rows.items()} == {"train": 6, "validation": 4}
    again = ReasoningGymSource(TASKS, size=3, validation=2, seed=5).load("prompts")
    assert again["train"].to_list() == rows["train"].to_list()
    assert not set(rows["train"]["prompt"]) & set(rows["validation"]["prompt"])
    first = rows["train"][0]
    assert json.loads(first[COLUMN]) == {
        "task": "chain_sum",
        "config": {**TASKS["chain_sum"], "seed": mixed_seed("train", 5) % (2**31 - 3), "size": 3},
        "index": 0,
    }
    assert first["prompt"].endswith("Write your final answer between <answer> and </answer>.")


def test_the_tasks_own_verifiers_judge_and_nothing_that_they_evaluate_gets_out(rows, tmp_path):
    try:
        isolation = Sandbox().tool
    except UserError as error:
        pytest.skip(str(error))
    reward = ReasoningGymReward(isolation=isolation, seconds=30.0)
    truths = rows["train"]["answer"]
    target = tmp_path / "target"
    answers = [
        f"<answer>0</answer> no: <answer> {truths[0]} </answer>",
        f"it is {truths[1]}",
        f"<answer>{int(truths[2]) + 1}</answer>",
        f"<answer>{truths[3]}</answer>",
        f"<answer>__import__('pathlib').Path('{target}').write_text('x')</answer>",  # countdown's verifier runs it
        "<answer>__import__('os').kill(1, 9) or __import__('os')._exit(0)</answer>",
    ]
    found = checked_scores(reward, samples(rows["train"], answers)).tolist()
    # The verifiers give a hundredth or so for a wrong answer in the right form.
    assert [score == 1.0 for score in found] == [True, False, False, True, False, False]
    assert all(score < 0.2 for score, right in zip(found, [1, 0, 0, 1, 0, 0], strict=True) if not right)
    assert not target.exists()
    # The process lives on.
    assert checked_scores(reward, samples(rows["train"], [f"<answer>{truths[0]}</answer>"])).tolist() == [1.0]


def test_tasks_that_can_not_be_made():
    with pytest.raises(UserError, match="task 'no_such_task'"):
        ReasoningGymSource({"no_such_task": {}}).load("prompts")
    with pytest.raises(UserError, match=r"task 'chain_sum' with \{'min_terms': 9, 'max_terms': 2\}"):
        ReasoningGymSource({"chain_sum": {"min_terms": 9, "max_terms": 2}}).load("prompts")
    with pytest.raises(UserError, match="name one"):
        ReasoningGymSource({})
