"""What the README tells people to type exists, parses, and is no more than it promises."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from rlhf_lightning.cli import COMMANDS, FIT_COMMANDS, TRAINER_COMMANDS, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LINES = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
OURS = [line.split("#")[0] for line in LINES if "-m rlhf_lightning" in line]
TRAINING = [line for line in OURS if shlex.split(line)[3] in TRAINER_COMMANDS]


def test_it_is_short_and_has_two_set_up_commands():
    assert len(README.splitlines()) <= 250
    assert [line.split("#")[0].split() for line in LINES if line.startswith("make")] == [
        ["make", "quickstart"],
        ["make", "test"],
    ]


def test_its_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", README, re.MULTILINE)) <= set(targets)


def test_its_commands_are_ours():
    assert len(OURS) >= 10
    assert {shlex.split(line)[3] for line in OURS} <= {*COMMANDS, *FIT_COMMANDS, *TRAINER_COMMANDS}


@pytest.mark.parametrize("line", TRAINING)
def test_its_training_commands_parse(line, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit_:
        main([*shlex.split(line)[3:], "--print_config"])
    assert exit_.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["class_path"].startswith("rlhf_lightning.modules")


def test_the_files_that_it_names_are_there():
    for path in re.findall(r"`(?:configs/)?((?:quickstart|recipes)/[\w.]+\.yaml)`", README):
        assert (ROOT / "configs" / path).is_file(), path
    for name in re.findall(r"^\| `(\w+\.yaml)`", README, re.MULTILINE):
        assert (ROOT / "configs" / "recipes" / name).is_file(), name


def test_the_rooms_of_the_tree_in_contributing_are_the_packages():
    tree = re.search(r"```\nrlhf_lightning/\n(.*?)configs/", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)[1]
    rooms = set(re.findall(r"^  (\w+)/", tree, re.MULTILINE))
    assert rooms == {path.parent.name for path in (ROOT / "rlhf_lightning").glob("*/__init__.py")}
