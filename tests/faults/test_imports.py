"""A YAML runs no code but ours, unless the command line names it: every way that a config can say an import path."""

import json
import re
import sys

import pytest
import yaml

from rlhf_lightning.cli import main
from rlhf_lightning.commands.imports import POLICY, take_imports

EVIL = """
from pathlib import Path
Path(__file__).with_suffix(".ran").touch()

def reward(prompts, completions):
    return [1.0] * len(prompts)

class Thing:
    pass
"""
FIT = ["fit", "--config", "configs/quickstart/ppo.yaml", "--trainer.accelerator", "cpu", "--wandb", "disabled"]


@pytest.fixture
def evil(tmp_path, monkeypatch, request):
    """A module that can be imported, leaves a file behind if it is, and that nobody asked for."""
    monkeypatch.chdir(request.config.rootpath)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"evil_{tmp_path.name.replace('-', '_')}"
    file = tmp_path / f"{name}.py"
    file.write_text(EVIL)
    yield file
    take_imports([])
    sys.modules.pop(name, None)


def ran(evil) -> bool:
    return evil.with_suffix(".ran").exists()


def refused(capsys, args) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    return said


def overlay(tmp_path, content) -> str:
    path = tmp_path / "from_somebody.yaml"
    path.write_text(yaml.safe_dump(content) if isinstance(content, dict) else content)
    return str(path)


def model(**init_args):
    return {"model": {"init_args": init_args}}


WAYS = {
    "a class": ("model.init_args.reward.class_path", lambda m: model(reward={"class_path": f"{m}.Thing"})),
    "a class, short form": ("model.init_args.reward", lambda m: model(reward=f"{m}.Thing")),
    "a class beside text": (
        "data.init_args.source", lambda m: {"data": {"init_args": {"source": {"class_path": f"{m}.Thing"}}}}
    ),
    "a factory": ("model.init_args.optimizer", lambda m: model(optimizer=f"{m}.reward")),
    "a factory's class": ("model.init_args.optimizer.class_path", lambda m: model(optimizer={"class_path": f"{m}.Thing"})),
    "a callback": ("trainer.callbacks.0.class_path", lambda m: {"trainer": {"callbacks": [{"class_path": f"{m}.Thing"}]}}),
    "a logger": ("trainer.logger", lambda m: {"trainer": {"logger": {"class_path": f"{m}.Thing"}}}),
    "a function": (
        "init_args.function",
        lambda m: model(reward={"class_path": "FunctionReward", "init_args": {"function": f"{m}.reward"}}),
    ),
    "a part of a sum": (
        "rewards.0.init_args.function",
        lambda m: model(
            reward={
                "class_path": "WeightedRewards",
                "init_args": {"rewards": [{"class_path": "FunctionReward", "init_args": {"function": f"{m}.reward"}}]},
            }
        ),
    ),
    "a function as class": (
        "init_args.function",
        lambda m: model(reward={"class_path": "FunctionReward", "init_args": {"function": {"class_path": f"{m}.reward"}}}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_config_can_not_import_what_the_command_line_does_not_name(tmp_path, capsys, evil, way):
    key, config = WAYS[way]
    path = overlay(tmp_path, config(evil.stem))
    said = refused(capsys, [*FIT, "--config", path, "--trainer.default_root_dir", str(tmp_path / "run")])
    assert not ran(evil)
    assert path in said
    assert key in said
    assert f"--import {evil.stem}" in said


def test_the_file_of_a_function_is_not_run_either(tmp_path, capsys, evil):
    path = overlay(
        tmp_path, model(reward={"class_path": "FunctionReward", "init_args": {"function": f"{evil}:reward"}})
    )
    said = refused(capsys, [*FIT, "--config", path])
    assert not ran(evil)
    assert f"--import {evil}" in said
    assert f"{path}:6, model.init_args.reward.init_args.function" in said


def test_nor_from_a_config_within_a_config(tmp_path, capsys, evil):
    inner = tmp_path / "reward.yaml"
    inner.write_text(yaml.safe_dump({"class_path": f"{evil.stem}.Thing"}))
    refused(capsys, [*FIT, "--config", overlay(tmp_path, model(reward=str(inner)))])
    assert not ran(evil)


@pytest.mark.parametrize(
    "function",
    [
        {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": "{folder}", "model": "x", "source": "local"}},
        {"class_path": "torch.load", "init_args": {"f": "{file}", "weights_only": False}},
        {"class_path": "rlhf_lightning.rewards.function.module_from_file", "init_args": {"path": "{file}"}},
        {"class_path": "rlhf_lightning.commands.imports.import_given", "init_args": {"name": "{file}"}},
        {"class_path": "lightning.fabric.utilities.cloud_io._load", "init_args": {"path_or_url": "{file}"}},
        "rlhf_lightning.commands.pipeline.subprocess.run",
        "os.system",
    ],
    ids=lambda f: f["class_path"] if isinstance(f, dict) else f,
)
@pytest.mark.parametrize("where", ["reward", "callback"])
def test_functions_of_ours_or_of_torch_are_not_for_a_file_to_call(tmp_path, capsys, evil, function, where):
    """Where a type is any callable, jsonargparse would call a function that is named as class_path, with its init_args."""
    said_function = json.loads(json.dumps(function).replace("{folder}", str(tmp_path)).replace("{file}", str(evil)))
    (tmp_path / "hubconf.py").write_text(EVIL)
    if where == "reward":
        config = model(reward={"class_path": "FunctionReward", "init_args": {"function": said_function}})
    else:
        callback = {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"setup": said_function}}
        config = {"trainer": {"callbacks": [callback]}}
    refused(capsys, [*FIT, "--config", overlay(tmp_path, config), "--trainer.default_root_dir", str(tmp_path / "run")])
    assert not ran(evil)
    assert not (tmp_path / "hubconf.ran").exists()


def test_yaml_makes_no_python_objects(tmp_path, capsys):
    ran_ = tmp_path / "ran"
    refused(
        capsys,
        [*FIT, "--config", overlay(tmp_path, f"seed_everything: !!python/object/apply:os.system ['touch {ran_}']")],
    )
    assert not ran_.exists()


@pytest.mark.parametrize("key", ["import", "imports", "--import"])
def test_a_file_can_not_give_the_flag(tmp_path, capsys, evil, key):
    refused(capsys, [*FIT, "--config", overlay(tmp_path, {key: str(evil)})])
    assert not ran(evil)


@pytest.mark.parametrize(
    "options", [{"import": "{file}"}, {"import={file}": 1}, {"seed_everything": "--import={file}"}], ids=str
)
def test_nor_can_the_plan_of_a_pipeline(tmp_path, capsys, evil, options):
    options = json.loads(json.dumps(options).replace("{file}", str(evil)))
    plan = {"stages": [{"name": "a", "config": ["configs/quickstart/sft.yaml"]}], "output": str(tmp_path / "out")}
    said = refused(capsys, ["pipeline", "--config", overlay(tmp_path, plan | {"options": options})])
    assert "--import" in said
    assert not ran(evil)


def test_a_models_own_code_needs_its_name_twice(tmp_path, capsys, request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    path = overlay(tmp_path, model(policy={"path": "somebody/model", "trust_remote_code": True}))
    said = refused(capsys, [*FIT, "--config", path])
    assert "trust_remote_code" in said
    assert "--import somebody/model" in said


@pytest.mark.parametrize("form", ["file", "module"])
def test_what_the_command_line_names_works(tmp_path, capsys, evil, form):
    given, function = (str(evil), f"{evil}:reward") if form == "file" else (evil.stem, f"{evil.stem}.reward")
    path = overlay(tmp_path, model(reward={"class_path": "FunctionReward", "init_args": {"function": function}}))
    with pytest.raises(SystemExit, match="0"):
        main([*FIT, "--config", path, "--import", given, "--print_config"])
    assert ran(evil)
    assert re.search(r"function: .*reward", capsys.readouterr().out)


def test_a_class_of_the_users_file_works_wherever_the_file_lies(tmp_path, capsys, request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    mine = tmp_path / "my_losses_of_the_test.py"
    mine.write_text(
        "from dataclasses import dataclass\nfrom rlhf_lightning.losses import DPOLoss\n"
        "@dataclass(frozen=True)\nclass Mine(DPOLoss):\n    mine: int = 3\n"
    )
    args = ["fit", "--config", "configs/quickstart/dpo.yaml", "--model.loss", "my_losses_of_the_test.Mine"]
    assert "--import my_losses_of_the_test" in refused(capsys, args)
    with pytest.raises(SystemExit, match="0"):
        main([*args, f"--import={mine}", "--model.loss.mine", "5", "--print_config"])
    assert "mine: 5" in capsys.readouterr().out


def test_what_one_command_allowed_the_next_does_not(tmp_path, capsys, evil):
    args = [*FIT, "--model.reward", f"{evil.stem}.Thing"]
    take_imports(["--import", evil.stem])
    assert POLICY.allows(f"{evil.stem}.Thing")
    assert f"--import {evil.stem}" in refused(capsys, args)


def test_a_name_that_can_not_be_imported_is_an_error(capsys):
    assert "no_such_module_x" in refused(capsys, ["fit", "--import", "no_such_module_x"])
    assert "no_such.py" in refused(capsys, ["fit", "--import", "no_such.py"])
    assert "--import needs" in refused(capsys, ["fit", "--import"])


def test_a_stage_gets_the_flag(tmp_path, monkeypatch, evil):
    """The pipeline starts each stage as a command; what it was given, it hands on."""
    commands = []

    def record(command):
        commands.append(command)
        return 1

    monkeypatch.setattr("rlhf_lightning.commands.pipeline.run_fit", record)
    plan = {"stages": [{"name": "a", "config": ["configs/quickstart/sft.yaml"]}], "output": str(tmp_path / "out")}
    with pytest.raises(SystemExit):
        main(["pipeline", "--config", overlay(tmp_path, plan), "--import", str(evil)])
    assert commands[0][-2:] == ["--import", str(evil)]
