"""Two tiers of every property: a few dozen examples always, 10,000 in all where slow tests run. Both are the same each time."""

import itertools

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, settings

from rlhf_lightning.data import tokenization

settings.register_profile(
    "fuzz", derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
)


def pytest_generate_tests(metafunc):
    """``examples``: how many; a test's mark ``fuzz(fast, slow)`` says so for each tier."""
    mark = metafunc.definition.get_closest_marker("fuzz")
    if mark is not None:
        fast, slow = mark.args
        metafunc.parametrize("examples", [fast, pytest.param(slow, marks=pytest.mark.slow)])


@pytest.fixture
def tier(examples):
    """Hypothesis' settings for this tier."""
    return settings(settings.get_profile("fuzz"), max_examples=examples)


@pytest.fixture(autouse=True)
def unnamed(monkeypatch):
    """Datasets are not named by a hash of all that they hold, for that takes longer than all else."""
    numbers = (str(number) for number in itertools.count())
    monkeypatch.setattr("datasets.arrow_dataset.generate_fingerprint", lambda dataset: next(numbers))
    monkeypatch.setattr("datasets.fingerprint.update_fingerprint", lambda *_: next(numbers))


@pytest.fixture
def in_process(monkeypatch):
    """Rows are tokenized here and now: neither cache nor files nor processes."""

    def cached_map(dataset, function, *, features, settings, cache_dir=None):
        return Dataset.from_dict(function(dataset[:], list(range(len(dataset)))), features=features)

    monkeypatch.setattr(tokenization, "cached_map", cached_map)
    monkeypatch.setattr(
        tokenization, "tokenizer_fingerprint", lambda tokenizer: ""
    )  # names files, of which there are none
