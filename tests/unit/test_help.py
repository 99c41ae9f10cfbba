"""``--help`` describes every key of data modules and losses."""

import importlib
import inspect
import pkgutil
from dataclasses import is_dataclass

import pytest
from jsonargparse import ArgumentParser

import rlhf_lightning.cli
import rlhf_lightning.losses
from rlhf_lightning.data.format_table import FORMATS
from rlhf_lightning.data.module import RowsDataModule
from rlhf_lightning.data.sources import Source
from rlhf_lightning.data.splits import Split
from rlhf_lightning.evaluation.candidates import PromptRows


def below(base):
    """Every class of the package below another."""
    found = [made for one in base.__subclasses__() for made in (one, *below(one))]
    return [made for made in dict.fromkeys(found) if made.__module__.startswith("rlhf_lightning.")]


def losses():
    """Every class of a loss that YAML may name."""
    for module in pkgutil.walk_packages(rlhf_lightning.losses.__path__, "rlhf_lightning.losses."):
        members = vars(importlib.import_module(module.name)).values()
        yield from (
            made for made in members if inspect.isclass(made) and made.__module__ == module.name and is_dataclass(made)
        )


def helps(made):
    """What is said of each key."""
    parser = ArgumentParser()
    parser.add_class_arguments(made, "x")
    return {action.dest[2:]: str(action.help) for action in parser._actions if action.dest not in ("help", "x")}


NAMED = [*below(RowsDataModule), *losses(), *below(Source), Split, PromptRows]
CLASSES = [made for made in NAMED if not inspect.isabstract(made)]  # YAML names what is below an abstract class


@pytest.mark.parametrize("made", CLASSES, ids=lambda made: made.__name__)
def test_every_key_is_described(made):
    bare = [name for name, said in helps(made).items() if not name.endswith("help") and len(said.split()) < 3]
    assert bare == []


@pytest.mark.parametrize("made", below(RowsDataModule), ids=lambda made: made.__name__)
def test_data_modules_say_what_users_ask(made):
    said = helps(made)
    assert {"source", "batch_size", "format", "columns", "bad_rows", "split"} <= said.keys()
    text = said["format"].replace(",", " ").replace(".", " ").split()
    assert {known.name for known in FORMATS} <= set(text)
    limit = said.get("long_rows") or said.get("long_prompts") or said["max_length"]
    assert any(word in limit for word in ("dropped", "lose their end"))
    assert "column" in said["columns"]
    assert "5 %" in said["bad_rows"]
