"""The page of ``fit -c CONFIG --help`` has every key of the chosen classes, with meaning, type, default and value."""

import inspect
from pathlib import Path

import pytest

from rlhf_lightning.cli import main
from rlhf_lightning.commands.class_names import classes_in, is_choice, is_ours, subclasses
from rlhf_lightning.commands.help_page import help_page, sections, without_help
from rlhf_lightning.commands.typed_keys import parser_of
from rlhf_lightning.errors import UserError
from tests.parsers import trainer_parsers

ROOT = Path(__file__).parents[2]


@pytest.fixture
def page(monkeypatch):
    """The help page for these arguments at a terminal width."""
    monkeypatch.chdir(ROOT)

    def made(*args, columns=100):
        monkeypatch.setenv("COLUMNS", str(columns))
        return help_page("fit", trainer_parsers()[1]["fit"], args)

    return made


def entry(text, key):
    """The lines of a key."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line[2:].startswith(f"--{key} ") or line[2:] == f"--{key}")
    end = next((i for i in range(start + 1, len(lines)) if not lines[i].startswith("      ")), len(lines))
    return " ".join(line.strip() for line in lines[start:end])


def test_the_keys_of_the_chosen_classes_are_there_with_meaning_type_default_and_value(page):
    text = page("-c", "configs/quickstart/ppo.yaml", "--model.kl.coef", "0.1", "--help")
    assert "model: PPOModule" in text
    assert entry(text, "model.update.epochs") == (
        "* --model.update.epochs 2  (whole number; default 4; set in configs/quickstart/ppo.yaml:13) Passes over the rollout."
    )
    assert entry(text, "model.kl.coef").startswith("* --model.kl.coef 0.1  (number; default 0.05; set by a flag)")
    assert entry(text, "model.loss.clip_range").startswith("--model.loss.clip_range 0.2  (number) The ratio is clipped")
    assert entry(text, "model.policy.dtype").startswith("--model.policy.dtype float32  (float32, bfloat16 or float16)")
    assert "model.reward: RewardModelReward  (set in configs/quickstart/ppo.yaml:10)" in text
    assert "data.source: HHHWorld" in text
    assert "--model.optimizer.params" not in text  # the code gives them
    assert "``" not in text
    assert ":class:" not in text


def test_the_default_of_a_module_is_shown_where_its_class_has_another(page):
    flags = ["--model", "OnlineDPOModule", "--data", "PromptDataModule"]
    assert entry(page(*flags), "model.groups.size").startswith("--model.groups.size 2 ")
    assert entry(page(*flags), "model.optimizer.lr").startswith("--model.optimizer.lr 1e-06 ")
    assert "required" in entry(page(*flags), "model.reward")


def test_the_last_class_wins_and_takes_nothing_of_the_one_before(page):
    text = page("-c", "configs/quickstart/dpo.yaml", "--model.optimizer", "Adam", "--model.loss", "IPOLoss")
    assert "model.optimizer: Adam  (set by a flag)" in text
    assert "model.optimizer: AdamW" not in text
    assert entry(text, "model.optimizer.lr").startswith("--model.optimizer.lr 0.001")
    assert "model.loss: IPOLoss" in text


def test_each_object_of_a_list_has_a_section(page):
    text = page("-c", "configs/quickstart/dpo.yaml", "-c", "configs/quickstart/losses/rpo.yaml")
    assert "model.loss.losses.0: DPOLoss" in text
    assert "model.loss.losses.1: NLLLoss" in text
    assert entry(text, "model.loss.weights").startswith("* --model.loss.weights [1.0, 0.005]")


@pytest.mark.parametrize("columns", [80, 120])
def test_no_line_is_wider_than_the_terminal(page, columns):
    for line in page("-c", "configs/recipes/rules_maths_grpo.yaml", columns=columns).splitlines():
        assert len(line) <= columns, line


def test_without_a_config_it_says_how_to_get_the_page(page):
    text = page("--help")
    assert "fit -c configs/quickstart/ppo.yaml --help" in text
    assert "PPOModule: " in text
    assert "PromptDataModule: " in text


def test_one_section_can_be_asked_for(page):
    text = page("-c", "configs/quickstart/ppo.yaml", "--help", "model.update")
    assert text.startswith("model.update: PPOUpdate\n")
    assert "model.update.reward_failures" in text
    assert "model.policy" not in text
    with pytest.raises(UserError, match=r"did you mean model\.update\?"):
        page("-c", "configs/quickstart/ppo.yaml", "--help", "model.updat")


def test_the_section_is_no_argument_of_the_command():
    assert without_help(["-c", "x", "--help", "model"]) == (["-c", "x"], "model")
    assert without_help(["--help=model", "--a", "-h"]) == (["--a"], "model")


def test_a_config_that_is_not_there_is_said(page):
    with pytest.raises(UserError, match=r"-c none\.yaml: there is no such file"):
        page("-c", "none.yaml", "--help")


def test_an_incomplete_or_wrong_config_has_a_page_too(page):
    """Help is printed for an incomplete config too."""
    text = page("--model", "GRPOModule", "--model.kl", "FixedKl", "--data.nothing", "1")
    assert "model.update: GRPOUpdate" in text


def test_the_command_prints_it(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit_:
        main(["sample", "-c", "configs/quickstart/best_of_n.yaml", "--help", "method"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("method: ")


def test_every_key_of_our_classes_has_a_meaning():
    """A docstring that does not name its arguments leaves the page empty."""
    seen, silent = set(), []
    waiting = [cls for section in sections(trainer_parsers()[1]["fit"], []) for cls in below(section)]
    while waiting:
        cls = waiting.pop()
        if cls in seen or not is_ours(cls) or not is_choice(cls) or inspect.isabstract(cls):
            continue
        seen.add(cls)
        for action in parser_of(cls)._actions:
            base = getattr(action, "basetype", None)
            waiting += [base] if base else []
            waiting += [x for found in classes_in(getattr(action, "_typehint", None)) for x in subclasses(found)]
            if base is None and not action.help:
                silent.append(f"{cls.__name__}.{action.dest}")
    assert len(seen) > 100
    assert silent == []


def below(section):
    bases = [section.cls, *(cls for entry in section.entries for cls in classes_in(entry.kind))]
    return [cls for base in bases if base for cls in subclasses(base)]
