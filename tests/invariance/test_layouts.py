"""Neither loss nor gradient nor any logged metric depends on the layout of the rows.

Not bit for bit: a matrix product of another shape adds in another order. In float64 that moves a number by about 1e-15 of
its largest summand, so a bound of 1e-9 holds on any CPU, and no fault of the layout is that small.
"""

from functools import cache

import pytest

from tests.invariance.compare import assert_same
from tests.invariance.rearrangements import PLAIN, REARRANGEMENTS
from tests.invariance.subjects import ARCHITECTURES, SUBJECTS, Trace, run, scalar_folder

CASES = [
    (subject, layout)
    for subject in SUBJECTS
    for layout in REARRANGEMENTS
    if SUBJECTS[subject].takes(REARRANGEMENTS[layout])
]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def scalar(architecture, tmp_path_factory):
    return scalar_folder(tmp_path_factory.mktemp("scalar"), architecture)


@cache
def plain_run(subject: str, architecture: str, scalar: str) -> Trace:
    return run(SUBJECTS[subject], architecture, scalar, PLAIN)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_plain_run_has_something_to_get_wrong(subject, architecture, scalar):
    """Every parameter is trained, and no metric is but a zero or a one."""
    plain = plain_run(subject, architecture, scalar)
    assert len(plain.gradients) == (4 if SUBJECTS[subject].online else 2)
    for gradients in plain.gradients:
        # One number more on every score is nothing to Plackett-Luce.
        level = {name for name in gradients if subject == "plackett-luce" and name.endswith("ln_f.bias")}
        assert min(float(g.abs().max()) for name, g in gradients.items() if name not in level) > 1e-5
    telling = {name for row in plain.logged for name, value in row.items() if value not in (0, 1)}
    silent = {name for row in plain.logged for name in row} - telling
    # The engine of these runs keeps no log-probabilities: those of the rollout are the policy's own, bit for bit.
    told = {f"train/sampling/sampling_logp_difference/{kind}" for kind in ("mean", "max")}
    rare = {"train/epoch", "train/early_stop", "train/rewards/failures", "train/rewards/skipped_iterations"}
    rare |= {f"train/{part}/iterations_without_signal" for part in ("groups", "rewards")} | {
        "train/frac_reward_zero_std"
    }
    if subject != "grpo":  # whose loss clips, and has the KL in it
        rare |= {"train/kl_loss", *(f"train/clip_ratio/{bound}_mean" for bound in ("low", "high", "region"))}
    if subject == "online cpo":  # without a reference the policy ranks all pairs of a batch alike
        rare |= {"train/rewards/accuracies"}
    if subject == "process reward":  # with three erroneous solutions, of which all are found or none
        rare |= {f"{stage}/first_error/{name}" for stage in ("train", "eval") for name in ("on_erroneous", "f1")}
    assert silent <= told | rare


@pytest.mark.parametrize(("subject", "layout"), CASES)
def test_nothing_depends_on_the_layout(subject, layout, architecture, scalar):
    arrangement = REARRANGEMENTS[layout]
    # transformers computes two things in float32 whatever the weights are: the softmax of eager attention, and Llama's norm.
    # The norm rounds the gradients of a prompt that is read twice before they are added, those of a shared one after that.
    shared_otherwise = SUBJECTS[subject].online and architecture == "rotary" and arrangement.micro == 1
    rtol = 1e-9 if arrangement.packed and not shared_otherwise else 3e-5
    got = run(SUBJECTS[subject], architecture, scalar, arrangement)
    assert_same(got, plain_run(subject, architecture, scalar), rtol=rtol)
