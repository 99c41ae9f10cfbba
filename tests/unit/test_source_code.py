"""Signatures read from source files are those of the classes themselves."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser

import rlhf_lightning
from rlhf_lightning.commands import registry, source_code
from rlhf_lightning.commands.early import class_of, usage
from rlhf_lightning.commands.imports import POLICY

SKIPPED = ("vllm_worker", "__main__", "inside", "cli", "commands")  # need an extra, are programs, or are not of YAML


def classes():
    """Every class of the package with its import path."""
    for found in pkgutil.walk_packages(rlhf_lightning.__path__, "rlhf_lightning."):
        if not any(part in found.name for part in SKIPPED):
            members = vars(importlib.import_module(found.name)).values()
            yield from (made for made in members if inspect.isclass(made) and made.__module__ == found.name)


def accepted(made):
    """Names of the arguments that jsonargparse accepts for a class."""
    parser = ArgumentParser()
    parser.add_class_arguments(made, "x", fail_untyped=False)
    names = [action.dest.split(".")[1] for action in parser._actions if action.dest.startswith("x.")]
    return {name for name in names if name != "help"}


def test_arguments_of_every_class_are_those_of_its_constructor():
    wrong, read = {}, 0
    for made in classes():
        arguments = source_code.parameters(source_code.find(f"{made.__module__}.{made.__name__}"))
        if arguments is None:  # left to the parser
            continue
        read += 1
        names = {argument.name for argument in arguments if not argument.name.startswith("_")}
        if names != accepted(made):
            wrong[f"{made.__module__}.{made.__name__}"] = names ^ accepted(made)
    assert wrong == {}
    assert read > 150


@pytest.mark.parametrize("made", [pl.Trainer, torch.optim.AdamW, torch.optim.SGD], ids=lambda made: made.__name__)
def test_arguments_of_classes_of_libraries(made):
    path = {pl.Trainer: "lightning.pytorch.trainer.trainer.Trainer"}.get(made, f"torch.optim.{made.__name__}")
    names = [argument.name for argument in source_code.parameters(source_code.find(path))]
    assert names == [name for name in inspect.signature(made.__init__).parameters if name != "self"]


@pytest.mark.parametrize(
    ("annotation", "kind"),
    [
        ("int", int),
        ("int | None", int | None),
        ("Optional[Union[int, float]]", float | int | None),
        ("Choice", source_code.Literal["a", "b"]),
    ],
)
def test_types_that_are_known_without_an_import(tmp_path, annotation, kind):
    file = tmp_path / "own.py"
    file.write_text('from typing import Literal, Optional, Union\nChoice = Literal["a", "b"]\n')
    here = source_code.Module("own", file)
    parsed = ast.parse(annotation, mode="eval").body
    if annotation == "Choice":
        parsed = here.definitions["Choice"].value  # modules are found on the path, where this one is not
    assert source_code.type_of(parsed, here, source_code.NUMBERS) == kind


@pytest.mark.parametrize("annotation", ["str", "list[int]", "int | list[int]", "Path", "torch.Tensor"])
def test_other_types_are_left_to_the_parser(tmp_path, annotation):
    file = tmp_path / "own.py"
    file.write_text("import torch\nfrom pathlib import Path\n")
    here = source_code.Module("own", file)
    with pytest.raises(LookupError):
        source_code.type_of(ast.parse(annotation, mode="eval").body, here, source_code.NUMBERS)


@pytest.mark.parametrize("command", ["chat", "export", "average"])
def test_a_command_of_plain_types_has_a_stand_in_with_its_signature(command):
    path = registry.COMMANDS[command]
    module, _, name = path.rpartition(".")
    function, found = getattr(importlib.import_module(module), name), source_code.stand_in(path)
    assert inspect.getdoc(found) == inspect.getdoc(function)
    theirs, ours = inspect.signature(function).parameters, inspect.signature(found).parameters
    assert [(p.name, p.default, p.annotation) for p in ours.values()] == [
        (p.name, p.default, p.annotation) for p in theirs.values()
    ]


@pytest.mark.parametrize("command", ["sample", "pipeline", "fixed-points"])
def test_a_command_that_takes_classes_has_none(command):
    assert source_code.stand_in(registry.COMMANDS[command]) is None


def test_the_command_list_has_every_command_with_a_sentence():
    lines = [line.split(maxsplit=1) for line in usage().splitlines() if line.startswith("  ")]
    assert [name for name, _ in lines] == [*registry.TRAINER_COMMANDS, *registry.COMMANDS, *registry.FIT_COMMANDS]
    assert all(said.endswith(".") for _, said in lines)


@pytest.fixture(autouse=True)
def nothing_imported(monkeypatch):
    """Other tests of this process may have allowed modules of a user."""
    monkeypatch.setattr(POLICY, "given", ())


def test_a_short_name_may_be_one_of_the_users_own(monkeypatch):
    assert class_of("DPOLoss").path == "rlhf_lightning.losses.dpo.DPOLoss"
    monkeypatch.setattr(POLICY, "given", ("own.py",))
    assert class_of("DPOLoss") is None


def test_only_what_a_config_may_import_is_read():
    assert class_of("subprocess.Popen") is None
    assert class_of("rlhf_lightning.errors.code") is None
    assert class_of("torch.optim.AdamW").path == "torch.optim.adamw.AdamW"
    assert Path(class_of("SFTModule").module.file).name == "sft.py"
