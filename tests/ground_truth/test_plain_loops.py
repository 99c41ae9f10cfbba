"""The gradients of every optimizer step of a short run are those of a loop over single sequences, in its direction and size.

The loops of ``plain_loops.py`` share no code with the package: padding, packing, micro-batches, normalisers, the choice of
pairs and the reference are all on one side only.
"""

import pytest
import torch

from tests.ground_truth.plain_loops import LOOPS, STEPS, Loop, drawn, pairs_of, score_of
from tests.invariance.rearrangements import Arrangement
from tests.invariance.subjects import PROMPTS, SUBJECTS, run, scalar_folder
from tests.methods import METHODS, methods_for

# Micro-batches of three cut the steps of 8 and 3 rows unevenly, and leave pairs that tie beside pairs that teach.
UNEVEN = Arrangement(micro=3)


@pytest.fixture(scope="module")
def scalar(tmp_path_factory):
    return scalar_folder(tmp_path_factory.mktemp("scalar"), "rotary")


def arrangement_of(name):
    return UNEVEN if SUBJECTS[name].takes(UNEVEN) and SUBJECTS[name].online else Arrangement()


@pytest.mark.parametrize("name", methods_for("gradient"))
def test_every_step_is_that_of_a_plain_loop(name, scalar):
    loop, online = Loop(name, scalar), METHODS[name].samples
    expected = loop.steps(LOOPS[name], passes=2 if online else 1)
    trace = run(SUBJECTS[name], "rotary", scalar, arrangement_of(name))
    assert len(trace.gradients) == len(expected) == len(STEPS) * (2 if online else 1)
    # Rows keep margins and soft labels in float32, which the loop has in float64.
    rtol = 1e-6 if name in ("reward model", "process reward") else 1e-8
    for number, (found, exact) in enumerate(zip(trace.gradients, expected, strict=True)):
        assert found.keys() == exact.keys()
        largest = max(float(value.norm()) for value in exact.values())
        assert largest > 1e-3
        for weight, value in exact.items():
            apart = float((found[weight].double() - value).norm())
            assert apart <= rtol * max(float(value.norm()), 0.01 * largest), (number, weight)


def test_online_dpo_logs_what_the_loop_counts(scalar):
    """The first iteration logs one mean over two passes over the pairs that are trained on."""
    loop = Loop("online dpo", scalar)
    rows, counted = STEPS[0], {"loss": [], "rewards/chosen": [], "rewards/margins": [], "rewards/accuracies": []}
    pairs, loss = pairs_of(rows), LOOPS["online dpo"]
    assert len(rows) > len(pairs) > 2  # some groups tie

    def note(loop, rows):
        value = loss(loop, rows)
        if rows == STEPS[0]:
            with torch.no_grad():
                ratios = [[0.3 * float(loop.log_ratio(PROMPTS[r], ids, 0.7)) for ids in both] for r, *both in pairs]
            counted["loss"].append(float(value))
            counted["rewards/chosen"] += [chosen for chosen, _ in ratios]
            counted["rewards/margins"] += [chosen - rejected for chosen, rejected in ratios]
            counted["rewards/accuracies"] += [float(chosen > rejected) for chosen, rejected in ratios]
        return value

    loop.steps(note, passes=2)
    logged = run(SUBJECTS["online dpo"], "rotary", scalar, UNEVEN).logged[0]
    for name, values in counted.items():
        assert logged[f"train/{name}"] == pytest.approx(sum(values) / len(values), rel=1e-4), name
    margins = [score_of(row, chosen) - score_of(row, rejected) for row, chosen, rejected in pairs]
    assert logged["train/objective/scores_margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-5)
    scores = [score_of(row, ids) for row in rows for ids in drawn(row)]
    assert logged["train/objective/scores"] == pytest.approx(sum(scores) / len(scores), rel=1e-5)
    assert logged["train/frac_reward_zero_std"] == pytest.approx(1 - len(pairs) / len(rows))
    assert logged["train/episode"] == len(scores)
