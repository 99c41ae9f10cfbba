"""The recorded numbers are those of the problem of today, and of the TRL that they name."""

import json

import pytest
import torch

from tests.peers import problem, record
from tests.peers.problem import network


@pytest.mark.parametrize("trl", record.CASES)
def test_every_case_is_recorded_with_the_versions(trl):
    found = record.read(trl)
    assert found["recorded"]["packages"]["trl"] == trl
    assert found["recorded"]["packages"].keys() == {"trl", "torch", "transformers", "accelerate"}
    assert found["runs"].keys() == record.CASES[trl].keys()


def test_another_problem_than_the_recorded_one_is_said(monkeypatch):
    monkeypatch.setitem(problem.SEEDS, "critic", 5)
    with pytest.raises(AssertionError, match=r"weights or rows are not those that TRL 1[.]12[.]0"):
        record.read("1.12.0")


def test_nothing_of_the_problem_comes_from_torchs_generator():
    torch.manual_seed(0)
    first = network("llama", "reward").state_dict()
    torch.manual_seed(1)
    for name, weight in network("llama", "reward").state_dict().items():
        assert torch.equal(weight, first[name]), name


@pytest.mark.parametrize("trl", record.CASES)
def test_the_installed_trl_computes_what_was_recorded(trl, paths, tmp_path):
    if record.installed() != trl:
        pytest.skip(f"needs trl=={trl}: `make peers`")
    for name, run in record.read(trl)["runs"].items():
        now = json.loads(json.dumps(record.compute(name, paths, tmp_path)))
        assert list(numbers(now)) == pytest.approx(list(numbers(run)), rel=1e-5, abs=1e-5), name


def numbers(x):
    """Every number of a run, in order."""
    if isinstance(x, dict):
        x = [x[key] for key in sorted(x)]
    if isinstance(x, list):
        for item in x:
            yield from numbers(item)
    else:
        yield float(x)
