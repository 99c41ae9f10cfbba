"""A reference that follows the policy is part of a run's state: killed between moves, it goes on as the run that was not."""

import pytest

from tests.resume.runs import differences
from tests.resume.test_killed import killed

# Six optimizer steps an epoch, two batches each; checkpoints after batches 6, 10, 12, ..., moves after batches 6, 12, 18, 24.
MOVING = ("--model.moving_reference.every", "3", "--model.moving_reference.alpha", "0.6")


@pytest.mark.slow
def test_killed_between_two_moves(crew, whole):
    folder = killed(crew, "dpo", "dpo-moving", ("batch", 9), ("batch", 5), more=MOVING)
    assert differences(whole("dpo", *MOVING), folder) == []
