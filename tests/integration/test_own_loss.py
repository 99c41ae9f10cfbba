"""docs/own_loss.md: its example runs as it is printed, from YAML and from Python, and its table says what the code asks for."""

import inspect
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from rlhf_lightning import losses
from rlhf_lightning.cli import main
from rlhf_lightning.losses.checks import QUALIFIED, abstract_methods

PAGE = (Path(__file__).parents[2] / "docs" / "own_loss.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files that the page says to save, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    Path("my_losses.py").write_text(blocks("python")[0])
    Path("my_dpo.yaml").write_text(blocks("yaml")[0])
    return tmp_path


def test_the_loss_has_ten_lines():
    lines = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(lines) == 10


def test_the_example_trains_from_yaml_and_then_from_python(folder):
    (command,) = [line for block in blocks("bash") for line in block.splitlines()]
    python, flag, package, *args = shlex.split(command)
    assert (python, flag, package) == ("python", "-m", "rlhf_lightning")
    main([*args, "--wandb", "disabled"])
    config = yaml.safe_load((folder / "runs" / "own_loss" / "config.yaml").read_text())
    loss = config["model"]["init_args"]["loss"]
    assert loss == {"class_path": "my_losses.MyLoss", "init_args": {"margin": 0.5, "beta": 0.2}}
    assert (folder / "runs" / "own_loss" / "export" / "model.safetensors").is_file()

    names: dict = {}
    exec(compile(blocks("python")[1], "own_loss.md", "exec"), names)
    assert names["trainer"].global_step == 2
    # At the first step the policy is its reference: every log-ratio is 0, and the loss is softplus(margin).
    assert type(names["module"].loss).__module__ == "my_losses"


def test_the_table_has_the_signatures_of_the_base_classes():
    rows = re.findall(r"^\| .*? \| `(\w+)`.*? \| (.+) \|$", PAGE, re.MULTILINE)
    assert [name for name, _ in rows] == [
        "PairLoss",
        "UnpairedLoss",
        "RankingLoss",
        "ListLoss",
        "LabelledLoss",
        "StepLoss",
        "PolicyLoss",
    ]
    for name, text in rows:
        base = getattr(losses, name)
        expected = []
        for member in abstract_methods(base):
            value = getattr(base, member)
            if isinstance(value, property):
                expected.append(member)
            else:
                expected.append(member + QUALIFIED.sub("", str(inspect.signature(value))))
        assert sorted(re.findall(r"`(.+?)`", text.replace(r"\|", "|"))) == sorted(expected)
