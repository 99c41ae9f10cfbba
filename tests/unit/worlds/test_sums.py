"""Sums: ratings and gold rewards against arithmetic done by Python, splits disjoint, the same rows from the same seed."""

import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.rewards.reward import Samples
from rlhf_lightning.rewards.world import GoldReward
from rlhf_lightning.worlds import SumsWorld

WORLD = SumsWorld(demonstrations=300, solutions=1500, prompts=300, held_out=200)


def test_a_rating_says_whether_a_step_is_true_and_steps_follow_from_each_other():
    rows = WORLD.load("stepwise")["train"]
    slips = 0
    for row in rows:
        reached = row["prompt"].split()[0]
        terms = row["prompt"].removesuffix(" ?").split()[1:]
        for place, (step, rating) in enumerate(zip(row["completions"], row["ratings"], strict=True)):
            asked, said = step.split(" = ")
            assert asked == " ".join([reached, *terms[2 * place : 2 * place + 2]])
            assert (eval(asked) == int(said)) == (rating == 1)
            slips += rating == -1
            reached = said
    assert 0.18 < slips / (3 * len(rows)) < 0.22


def test_the_gold_reward_is_one_for_the_right_number_at_the_end():
    prompt = "7 + 4 - 3 + 2 ?"
    right = "7 + 4 = 11 ; 11 - 3 = 8 ; 8 + 2 = 10"
    assert WORLD.gold(prompt, right) == (1, 3)
    assert WORLD.gold(prompt, right, truncated=True) == (0, 3)
    assert WORLD.gold(prompt, "7 + 4 = 11 ; 11 - 3 = 7 ; 7 + 2 = 9") == (0, 1)
    assert WORLD.gold(prompt, "7 + 4 = 10 ; 10 - 3 = 8 ; 8 + 2 = 10") == (1, 0)  # two slips that cancel
    assert WORLD.gold(prompt, "10") == (0, 0)
    assert WORLD.gold(prompt, "") == (0, 0)
    samples = Samples([prompt] * 2, [right, "= ;"], [[], []], [False, False])
    assert GoldReward(WORLD).score(samples).tolist() == [1, 0]


def test_writers_are_as_often_right_as_they_do_not_slip():
    rows = WORLD.load("demonstrations")["train"]
    solved = [WORLD.gold(row["prompt"], row["completion"]).reward for row in rows]
    assert 0.45 < sum(solved) / len(solved) < 0.62  # .8 ** 3, and a few slips that cancel


def test_held_out_sums_are_never_asked_in_training_and_seeds_repeat():
    train, held_out = (set(WORLD.load("prompts")[split]["prompt"]) for split in ("train", "validation"))
    assert not train & held_out
    assert not set(WORLD.load("stepwise")["train"]["prompt"]) & held_out
    assert WORLD.load("prompts")["train"][:] == SumsWorld(prompts=300).load("prompts")["train"][:]
    assert WORLD.load("prompts")["train"][:] != SumsWorld(seed=1, prompts=300).load("prompts")["train"][:]
    for row in WORLD.load("prompts")["train"]:
        assert int(row["answer"]) == eval(row["prompt"].removesuffix("?"))


def test_every_word_has_its_token():
    tokenizer = WORLD.tokenizer()
    for row in WORLD.load("demonstrations")["train"]:
        ids = tokenizer(f"{row['prompt']} {row['completion']}").input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == f"{row['prompt']} {row['completion']}"


def test_what_does_not_exist_is_refused():
    with pytest.raises(UserError, match="no 'preferences'"):
        WORLD.load("preferences")
    with pytest.raises(UserError, match="slips"):
        SumsWorld(slips=1.0)
