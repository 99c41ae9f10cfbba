"""Two ranks without processes: two threads whose sums meet."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest


@pytest.fixture
def on_two_ranks():
    """Results of ``work(rank, all_sum)`` on rank 0 and rank 1."""
    meet, sent = threading.Barrier(2, timeout=120), [0, 0]

    def all_sum_of(rank):
        def all_sum(value):
            sent[rank] = value
            meet.wait()
            total = sent[0] + sent[1]
            meet.wait()
            return total

        return all_sum

    def run(work):
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda rank: work(rank, all_sum_of(rank)), range(2)))

    return run
