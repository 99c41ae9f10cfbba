"""Toy prompts are shared here, so that these tests see what real ones go through."""

import pytest


@pytest.fixture(autouse=True)
def shared(short_prompts_are_shared):
    return
