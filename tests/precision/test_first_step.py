"""Learning rate 0, every method, every accepted precision: nothing has moved, so losses, ratios and KLs are known.

``python -m tests.precision.table`` prints the same numbers.
"""

import math
from dataclasses import replace

import pytest
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import Generation
from rlhf_lightning.generation.native import NativeEngine
from rlhf_lightning.generation.transformers_engine import TransformersEngine
from rlhf_lightning.modules.online import warn_of_unmeasured
from rlhf_lightning.rollouts.mismatch import Importance
from tests.precision.methods import METHODS, OFFLINE, PRECISIONS, SAMPLING, first_step

FLOAT32, MIXED, TRUE, WEIGHTS = PRECISIONS
EXACT = (
    "dpo",
    "kto",
    "ppo",
    "grpo",
    "online dpo",
)  # what float32 is tried on: the rest of it is tested everywhere else
HALF = [pytest.param(precision, id=str(precision)) for precision in PRECISIONS[1:]]


def cases(names):
    """Every method in every half precision, a few in float32."""
    return [
        pytest.param(name, precision, id=f"{name}-{precision}")
        for name in names
        for precision in PRECISIONS
        if precision.half or name in EXACT
    ]


@pytest.mark.parametrize(("name", "precision"), cases(name for name in OFFLINE if METHODS[name].loss is not None))
def test_a_policy_that_is_its_reference_has_the_loss_of_no_preference(name, precision, base):
    logged = first_step(name, precision, base)
    assert logged["loss"] == pytest.approx(METHODS[name].loss, abs=1e-6)
    margins = [value for key, value in logged.items() if key.startswith("rewards/") and key != "rewards/accuracies"]
    assert margins == pytest.approx([0] * len(margins), abs=1e-6)
    assert logged["grad_norm"] > 0


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("name", [name for name in OFFLINE if METHODS[name].loss is None])
def test_a_loss_without_a_reference_is_that_of_float32_up_to_rounding(name, precision, base):
    exact, rounded = (first_step(name, p, base)["loss"] for p in (FLOAT32, precision))
    assert rounded == pytest.approx(exact, abs=3e-2)
    assert rounded != exact  # it is half precision


@pytest.mark.parametrize(("name", "precision"), cases(SAMPLING))
def test_an_update_begins_where_the_rollout_was_drawn(name, precision, base):
    """Over all minibatches of the first pass: ratio 1, nothing clipped, no KL to the sampler, none to the reference."""
    logged = first_step(name, precision, base)
    exact = 0.0 if precision.half else 1e-5
    if name == "online dpo":
        assert logged["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert logged["rewards/margins"] == pytest.approx(0, abs=1e-6)
    else:
        clipped = [value for key, value in logged.items() if "clipfrac" in key or key.startswith("clip_ratio")]
        assert clipped
        assert set(clipped) == {0.0}
        assert logged["val/ratio"] == pytest.approx(1, abs=1e-6)
        assert 0 <= logged["policy/approxkl_avg"] <= exact**2
    assert logged["objective/kl"] == pytest.approx(0, abs=10 * exact)
    # No more than rounding, and none where kernels add in the same order: a wrong position or mask would be tenths.
    assert logged["sampling/sampling_logp_difference/max"] < (0.1 if precision.half else 1e-4)


# ---------------------------------------------------------------- engines, settings and ranks


@pytest.mark.parametrize("precision", [pytest.param(FLOAT32, id="32-true"), pytest.param(MIXED, id="bf16-mixed")])
@pytest.mark.parametrize("name", ["ppo", "gspo", "online dpo"])
def test_the_transformers_engine_is_measured_too(name, precision, base):
    logged = first_step(name, precision, base, engine=TransformersEngine())
    assert logged["sampling/sampling_logp_difference/max"] < (0.1 if precision.half else 1e-4)
    assert logged["objective/kl"] == pytest.approx(0, abs=0 if precision.half else 1e-4)
    if name != "online dpo":
        assert logged["val/ratio"] == pytest.approx(1, abs=1e-6)


class Hotter(TransformersEngine):
    """Samples at another temperature than it is told to."""

    def generate(self, network, input_ids, attention_mask, sampling, **ends):
        return super().generate(network, input_ids, attention_mask, replace(sampling, temperature=1.5), **ends)


class Off(NativeEngine):
    """Reports log-probabilities that are too low and too high by 0.3 nats, in turn."""

    def generate(self, *arguments, **ends):
        generation = super().generate(*arguments, **ends)
        error = torch.where(torch.arange(generation.tokens.shape[1]) % 2 == 0, -0.3, 0.3)
        return generation._replace(logprobs=generation.logprobs + error)


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("name", ["ppo", "grpo", "online dpo"])
def test_what_an_engine_is_off_by_is_measured(name, precision, base):
    logged = first_step(name, precision, base, engine=Off())
    assert logged["sampling/sampling_logp_difference/max"] == pytest.approx(0.3, abs=0.1)  # and the rounding


class Silent(NativeEngine):
    """Keeps its log-probabilities to itself."""

    def generate(self, *arguments, **ends):
        return Generation(super().generate(*arguments, **ends).tokens)


@pytest.mark.parametrize("name", ["ppo", "grpo", "online dpo"])
def test_an_engine_that_samples_another_distribution_is_refused(name, base):
    with pytest.raises(UserError, match="it does not sample what the policy computes"):
        first_step(name, FLOAT32, base, engine=Hotter())


def test_in_half_precision_another_distribution_shows_in_the_log(base):
    assert first_step("grpo", MIXED, base, engine=Hotter())["sampling/sampling_logp_difference/max"] > 0.2


def test_an_engine_that_can_not_be_measured_is_named(base, caplog):
    warn_of_unmeasured.cache_clear()
    logged = first_step("grpo", FLOAT32, base, engine=Silent())
    assert "sampling/sampling_logp_difference/max" not in logged
    assert "Silent gives no log-probabilities" in caplog.text


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_half_precision_may_weigh_instead(name, base):
    logged = first_step(name, MIXED, base, engine=Off(), importance=Importance(half_precision="weigh"))
    low, high = (logged[f"sampling/importance_sampling_ratio/{end}"] for end in ("min", "max"))
    assert (math.log(low), math.log(high)) == pytest.approx((-0.3, 0.3), abs=0.1)
    assert logged["val/ratio"] == pytest.approx(1, abs=1e-6)


def test_online_dpo_has_nothing_to_weigh(base):
    with pytest.raises(UserError, match=r"update\.importance weighs advantages, and online DPO has none"):
        first_step("online dpo", MIXED, base, importance=Importance(cap=3.0))
