"""How many logits exist at once: those of the tokens that are asked for, in one micro-batch, and no others.

trl#3678: the full logits of a batch, B x T x V, were what ran out of memory; TRL's PPO kept those of the whole rollout.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.invariance.rearrangements import PLAIN, STEP, VOCABULARY, Arrangement
from tests.invariance.subjects import ANSWERS, CHOSEN, HIDDEN, LONGEST, REJECTED, SUBJECTS, run, scalar_folder


class MostLogits(TorchDispatchMode):
    """How many positions the head of a language model was applied to at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        by_the_head = args and isinstance(args[-1], torch.Tensor) and args[-1].shape == (HIDDEN, VOCABULARY)
        if by_the_head and not function.is_view:
            self.rows = max(self.rows, result.numel() // VOCABULARY)
        return result


@pytest.fixture
def scalar(tmp_path):
    return scalar_folder(tmp_path, "rotary")


@pytest.mark.parametrize("arrangement", [PLAIN, Arrangement(before=20, after=20)])
@pytest.mark.parametrize(("subject", "rows"), [("sft", [CHOSEN]), ("dpo", [CHOSEN, REJECTED])])
def test_prompts_and_padding_never_meet_the_vocabulary(scalar, subject, rows, arrangement):
    with MostLogits() as most:
        run(SUBJECTS[subject], "rotary", scalar, arrangement)
    assert most.rows == sum(len(ids) for side in rows for ids in side[:STEP])


@pytest.mark.parametrize("subject", ["ppo", "ppo, shared trunk"])
@pytest.mark.parametrize("micro", [1, 2, STEP])
def test_rollout_update_and_validation_look_at_one_micro_batch_at_a_time(scalar, subject, micro):
    with MostLogits() as most:
        run(SUBJECTS[subject], "rotary", scalar, Arrangement(micro=micro))
    assert LONGEST <= most.rows <= sum(sorted(map(len, ANSWERS))[-micro:])
