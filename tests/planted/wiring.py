"""Bugs where no formula lives: in schedules, caches, splits, buffers and the calls between them.

Each list is one pattern of bugs that tests have missed. Every bug is caught by tests of the default tier (``make test``).
"""

from collections.abc import Callable

from tests.planted.bugs import Bug, bug


def of_pattern(pattern: str) -> Callable[..., Bug]:
    """A function like :func:`.bug` whose bugs have the pattern as their source."""

    def make(name: str, file: str, old: str, new: str, *tests: str) -> Bug:
        return bug(name, pattern, file, old, new, *tests)

    return make


schedule = of_pattern("schedules and controllers")
SCHEDULES: list[Bug] = []

validation = of_pattern("validation must not touch training")
VALIDATION: list[Bug] = []

key = of_pattern("cache keys and fingerprints")
KEYS: list[Bug] = []

symmetry = of_pattern("toy data too symmetric to tell")
SYMMETRY: list[Bug] = []

numerics = of_pattern("numerics at the boundary")
NUMERICS: list[Bug] = []

method = of_pattern("a method in no list")
METHODS: list[Bug] = []

interval = of_pattern("intervals over prompts that come more than once")
INTERVALS: list[Bug] = []

itself = of_pattern("tests that compare the code with itself")
ITSELF: list[Bug] = []

WIRING: list[Bug] = [*SCHEDULES, *VALIDATION, *KEYS, *SYMMETRY, *NUMERICS, *METHODS, *INTERVALS, *ITSELF]
