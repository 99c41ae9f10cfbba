"""Whether two runs showed the same."""

import math

import torch

from tests.invariance.subjects import Trace

ALMOST_ZERO = (
    1e-6  # float32's rounding of metrics that are differences of numbers near 1, such as the explained variance
)
CANCELS = {
    "train/policy_loss": 3e-5,  # REINFORCE's, averaged in float32: advantages of both signs times 30 nats
    "train/sampling/sampling_logp_difference/max": 1e-5,  # the policy against itself
}


def assert_same(got: Trace, expected: Trace, rtol: float) -> None:
    """Compare metrics one by one to 1e-5, for they are averaged in float32, and tensors relative to their largest entry.

    Single entries of a tensor are sums that cancel. A tensor that is a hundred times smaller than the largest of its step is
    a sum that cancelled as a whole.
    """
    assert len(got.logged) == len(expected.logged)
    for own, other in zip(got.logged, expected.logged, strict=True):
        assert own.keys() == other.keys()
        rel = max(1e-5, rtol)
        same = {k: math.isclose(own[k], other[k], rel_tol=rel, abs_tol=CANCELS.get(k, ALMOST_ZERO)) for k in own}
        different = {k: (own[k], other[k]) for k in own if not same[k]}
        assert different == {}, different
    assert len(got.gradients) == len(expected.gradients)
    for own, other in zip([*got.gradients, got.weights], [*expected.gradients, expected.weights], strict=True):
        assert own.keys() == other.keys()
        largest = max(float(value.abs().max()) for value in other.values())
        for name, value in other.items():
            atol = rtol * max(float(value.abs().max()), largest / 100)
            torch.testing.assert_close(own[name], value, rtol=0, atol=atol, msg=f"{name}: {own[name]} is not {value}")
