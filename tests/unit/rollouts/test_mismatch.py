"""An engine with numbers of its own: the weights by hand, and what is refused."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.policy import importance_weights
from rlhf_lightning.generation.engine import Generation
from rlhf_lightning.generation.native import NativeEngine
from rlhf_lightning.generation.transformers_engine import TransformersEngine
from rlhf_lightning.generation.vllm_engine import VLLMEngine
from rlhf_lightning.rollouts.mismatch import (
    Importance,
    compared,
    gives_old_logprobs,
    old_logprobs_from,
    refuse_other_numbers,
    weighed,
)

MASK = torch.tensor([[True, True, False]])
POLICY = torch.tensor([[math.log(0.6), math.log(0.9), 7.0]])
ENGINE = torch.tensor([[math.log(0.8), math.log(0.3), -7.0]])


def test_weights_are_policy_over_engine_up_to_the_cap_and_one_where_nothing_was_drawn():
    weights = importance_weights(POLICY, ENGINE, MASK, cap=2.0, how="token_truncate")
    torch.testing.assert_close(weights, torch.tensor([[0.75, 2.0, 1.0]]))


@pytest.mark.parametrize(
    ("how", "cap", "expected"),
    [
        ("token_mask", 2.0, [0.75, 0.0, 1.0]),
        ("sequence_truncate", 2.0, [2.0, 2.0, 1.0]),  # .75 x 3 = 2.25
        ("sequence_mask", 2.0, [0.0, 0.0, 1.0]),
        ("sequence_mask", 3.0, [2.25, 2.25, 1.0]),
    ],
)
def test_what_becomes_of_a_weight_beyond_the_cap(how, cap, expected):
    torch.testing.assert_close(importance_weights(POLICY, ENGINE, MASK, cap=cap, how=how), torch.tensor([expected]))


def test_a_token_that_is_too_far_from_the_policy_is_an_error_in_float32_and_not_in_half():
    refuse_other_numbers(POLICY, POLICY + 0.005, MASK, "32-true")
    refuse_other_numbers(POLICY, ENGINE, MASK, "bf16-mixed")
    with pytest.raises(UserError, match=r"up to 1\.1 nats"):
        refuse_other_numbers(POLICY, ENGINE, MASK, "32-true")


def test_an_engine_that_keeps_no_log_probabilities_can_not_be_corrected_for():
    with pytest.raises(UserError, match="has to give the log-probabilities"):
        weighed(SimpleNamespace(), Generation(torch.zeros(1, 3)), Importance())


SOURCES = {
    (NativeEngine, False): "sampled",
    (NativeEngine, True): "scored",
    (TransformersEngine, False): "sampled",
    (TransformersEngine, True): "scored",
    (VLLMEngine, False): "weighed",
    (VLLMEngine, True): "weighed",
}


@pytest.mark.parametrize(("engine", "half"), SOURCES)
def test_one_function_decides_where_old_log_probabilities_come_from(engine, half):
    assert old_logprobs_from(engine, half=half, importance=Importance()) == SOURCES[engine, half]
    weigh = old_logprobs_from(engine, half=half, importance=Importance(half_precision="weigh"))
    assert weigh == ("weighed" if half else SOURCES[engine, half])


@dataclass(frozen=True)
class Known:
    """What a comparison reads of a rollout."""

    logprobs: torch.Tensor
    advantages: torch.Tensor
    response_mask: torch.Tensor = MASK


def known():
    return Known(POLICY, torch.ones_like(POLICY))


@pytest.mark.parametrize("exact", [False, True])
def test_scored_log_probabilities_are_measured_and_nothing_is_weighed(exact):
    drawn = Generation(torch.zeros(1, 3), POLICY + 0.004)
    rollout, counted = compared(known(), drawn, "scored", Importance(), exact=exact)
    assert rollout.advantages.tolist() == [[1, 1, 1]]
    total, count = counted["sampling/sampling_logp_difference/mean"]
    assert (total / count).item() == pytest.approx(0.004, rel=1e-3)


def test_an_engine_that_samples_something_else_is_refused_where_numbers_should_be_equal():
    drawn = Generation(torch.zeros(1, 3), ENGINE)
    compared(known(), drawn, "scored", Importance(), exact=False)
    with pytest.raises(UserError, match=r"up to 1\.1 nats"):
        compared(known(), drawn, "scored", Importance(), exact=True)
    # The transformers engine keeps no entropies, so that its tokens are scored again in float32 as well.
    with pytest.raises(UserError, match=r"up to 1\.1 nats"):
        compared(known(), drawn, "sampled", Importance(), exact=True)


def test_what_is_weighed_in_half_precision_is_weighed_as_for_another_engine():
    drawn = Generation(torch.zeros(1, 3), ENGINE, torch.zeros(1, 3))
    rollout, counted = compared(known(), drawn, "weighed", Importance(half_precision="weigh"), exact=False)
    torch.testing.assert_close(rollout.advantages, torch.tensor([[0.75, 2.0, 1.0]]))
    assert counted["sampling/importance_sampling_ratio/max"][0] == 2


def test_the_engines_own_log_probabilities_are_checked_later_by_the_first_forward():
    drawn = Generation(torch.zeros(1, 3), ENGINE, torch.zeros(1, 3))
    assert gives_old_logprobs(drawn, "sampled")
    assert compared(known(), drawn, "sampled", Importance(), exact=True)[1] == {}
    assert not gives_old_logprobs(drawn, "scored")
    assert not gives_old_logprobs(Generation(torch.zeros(1, 3), ENGINE), "sampled")


def test_an_engine_without_log_probabilities_is_not_measured():
    assert compared(known(), Generation(torch.zeros(1, 3)), "scored", Importance(), exact=True)[1] == {}
