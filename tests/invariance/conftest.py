"""Toy prompts are shared here, so that these tests see what real ones go through."""

import pytest
import torch

torch.set_num_threads(1)  # as the ranks have: float32 sums differ with the number of threads


@pytest.fixture(autouse=True)
def shared(short_prompts_are_shared):
    return
