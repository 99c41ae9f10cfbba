"""Many samples at once."""

import threading
import time

import pytest

from rlhf_lightning.rewards.parallel import in_parallel


def test_answers_come_in_the_order_of_the_questions_and_at_the_same_time():
    together = threading.Barrier(3, timeout=120)

    def late(number):
        together.wait()  # passed only if all three are under way
        time.sleep(0.1 * (3 - number))
        return number

    assert in_parallel(late, [0, 1, 2], "late", workers=3) == [0, 1, 2]
    assert in_parallel(late, [], "none") == []


def test_what_one_raises_ends_the_whole():
    asked = []

    def breaks(number):
        asked.append(number)
        time.sleep(0.01)
        if number == 3:
            raise ValueError("three")

    with pytest.raises(ValueError, match="three"):
        in_parallel(breaks, range(1000), "breaks", workers=1)
    assert 4 <= len(asked) < 1000


def test_a_bar_is_for_a_terminal(capsys):
    in_parallel(time.sleep, [0.01] * 3, "quiet")
    assert capsys.readouterr().err == ""
