"""The notebooks run from top to bottom as they are committed, and what they say has been learnt has been learnt."""

import ast
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CELL_SECONDS = 550  # nothing that works takes as long, on a busy machine either


class ThisPython(AsyncKernelManager):
    """Starts kernels of the interpreter that runs the tests, whatever "python3" is registered as, or nothing."""

    @property
    def kernel_spec(self) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


def figures(name: str) -> dict[str, Any]:
    """Execute a notebook; the dictionary that its last code cell shows."""
    book = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    settings = {"metadata": {"path": str(ROOT)}}  # the package is found here, installed or not
    NotebookClient(book, timeout=CELL_SECONDS, kernel_manager_class=ThisPython, resources=settings).execute()
    last = [cell for cell in book.cells if cell.cell_type == "code"][-1]
    return ast.literal_eval(last.outputs[-1]["data"]["text/plain"])


def test_there_are_four():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_output_is_committed(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    for cell in book.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.slow
def test_quickstart():
    found = figures("01_quickstart.ipynb")
    assert -0.4 < found["SFT gold"] < 0.2
    assert found["gain"]["low"] > 0
    assert found["PPO wins over SFT"] > 0.55


@pytest.mark.slow
@pytest.mark.exhaustive
def test_preferences_and_reward_model():
    found = figures("02_preferences_and_reward_model.ipynb")
    assert 0.7 < found["accuracy"] < found["Bayes accuracy"]
    assert found["accuracy on gold order"] > 0.75
    assert found["expected calibration error"] < 0.1
    assert found["score and gold reward"] > 0.5


@pytest.mark.slow
@pytest.mark.exhaustive
def test_ppo_against_dpo():
    found = figures("03_ppo_against_dpo.ipynb")
    for method in ("dpo", "ppo"):
        assert found[method]["gain"]["low"] > 0, method
        assert 0.3 < found[method]["KL, nats"] < 10, method


@pytest.mark.slow
@pytest.mark.exhaustive
def test_ground_truth():
    found = figures("04_ground_truth.ipynb")
    for method, most in (("PPO", 2e-2), ("DPO", 5e-2)):
        assert found[method]["KL to the optimum"] < most, method
        assert found[method]["gradient error"] < 1e-5, method
        assert found[method]["most above the frontier"] < 1e-3, method
    assert found["k3 in the reward"]["gradient error"] > 1e-2
