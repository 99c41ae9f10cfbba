"""How much work something is, counted in function calls: the same on every machine, however busy."""

import cProfile
import pstats
from collections.abc import Callable
from typing import Any


def function_calls(work: Callable[[], Any]) -> int:
    """The number of Python and built-in functions that are called while ``work`` runs."""
    profile = cProfile.Profile()
    profile.runcall(work)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]
