"""How many logits exist at once: those of the tokens that are asked for, in one micro-batch, and no others.

trl#3678: the full logits of a batch, B x T x V, were what ran out of memory; TRL's PPO kept those of the whole rollout.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.invariance.rearrangements import PLAIN, STEP, VOCABULARY, Arrangement
from tests.invariance.subjects import ANSWERS, CHOSEN, HIDDEN, LONGEST, REJECTED, SUBJECTS, UNPAIRED, run, scalar_folder
from tests.methods import methods_for


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


METHODS_OF_TOKENS = methods_for("memory")
OFFLINE = [name for name in METHODS_OF_TOKENS if not SUBJECTS[name].online]
SAMPLING = [name for name in METHODS_OF_TOKENS if SUBJECTS[name].online]
# Responses that a method's rows of the first step hold: of unpaired rows, those of the prompts' neighbours are scored apart.
RESPONSES = {"texts": [CHOSEN], "pairs": [CHOSEN, REJECTED], "unpaired": [UNPAIRED["completion_ids"]]}


@pytest.mark.parametrize("arrangement", [PLAIN, Arrangement(before=20, after=20)], ids=["plain", "padded"])
@pytest.mark.parametrize("subject", OFFLINE)
def test_prompts_and_padding_never_meet_the_vocabulary(scalar, subject, arrangement):
    rows = RESPONSES[SUBJECTS[subject].method.rows]
    with MostLogits() as most:
        run(SUBJECTS[subject], "rotary", scalar, arrangement)
    tokens = sum(len(ids) for side in rows for ids in side[:STEP])
    # KTO's reference reads each answer a second time, behind another prompt.
    assert most.rows == (2 * tokens if subject == "kto" else tokens)


@pytest.mark.parametrize("subject", SAMPLING)
@pytest.mark.parametrize("micro", [1, 2, STEP])
def test_rollout_update_and_validation_look_at_one_micro_batch_at_a_time(scalar, subject, micro):
    """A micro-batch of online DPO is of pairs. Validation and scoring read a micro-batch of responses too."""
    with MostLogits() as most:
        run(SUBJECTS[subject], "rotary", scalar, Arrangement(micro=micro))
    longest = sorted(map(len, ANSWERS * 3))[-micro * SUBJECTS[subject].method.together :]
    assert LONGEST <= most.rows <= sum(longest)
