"""A stage of a pipeline is skipped if nothing that it was made from has changed, and only then."""

import inspect
from dataclasses import fields, replace
from pathlib import Path

import pytest

from rlhf_lightning.commands import pipeline as command
from rlhf_lightning.commands.pipeline import Stage, pipeline
from rlhf_lightning.commands.run_folder import CONFIG
from rlhf_lightning.errors import UserError


@pytest.fixture
def ran(monkeypatch):
    """The names of the stages that were run, each of which leaves what it makes."""
    names = []

    def run(words):
        key = "--trainer.default_root_dir" if "fit" in words else "--output"
        folder = Path(words[words.index(key) + 1])
        names.append(folder.name)
        (folder / "export").mkdir(parents=True, exist_ok=True)
        for name in ("export/config.json", "samples.jsonl", CONFIG):
            (folder / name).write_text("{}")
        return 0

    monkeypatch.setattr(command, "run_fit", run)
    monkeypatch.setattr(command, "check_export", lambda folder: "whole")
    monkeypatch.setattr(command, "check_same_text", lambda one, other: None)
    monkeypatch.setattr(command, "write_report", lambda *_: {"thresholds": []})
    return names


@pytest.fixture
def stages(tmp_path):
    """The third stage builds on the first alone, the last one on the second and the third."""
    configs = [str(tmp_path / f"{name}.yaml") for name in ("sft", "reward", "drawn", "ppo")]
    for config in configs:
        Path(config).write_text("model: {}\n")
    sft, reward, drawn, ppo = configs
    return [
        Stage("sft", [sft]),
        Stage("reward", [reward], {"model.network.path": "sft"}),
        Stage("drawn", [drawn], {"policy.path": "sft"}, command="sample", seed_keys=["prompts.seed"]),
        Stage("ppo", [ppo], {"model.policy.path": "drawn", "model.reward.path": "reward"}, {"model.iterations": 3}),
    ]


def other_text(stages):
    Path(stages[1].config[0]).write_text("model: {loss: BradleyTerryLoss}\n")
    return stages


def changed(number, **values):
    def change(stages):
        return [replace(stage, **values) if i == number else stage for i, stage in enumerate(stages)]

    return change


def with_second_file(stages):
    return changed(1, config=[*stages[1].config, stages[0].config[0]])(stages)


# A change of each part of a stage, and which stages are made anew: it, and whatever was made from it.
CHANGES = {
    "text": (other_text, ["reward", "ppo"]),
    "config": (with_second_file, ["reward", "ppo"]),
    "inputs": (changed(3, inputs={"model.policy.path": "sft", "model.reward.path": "reward"}), ["ppo"]),
    "input key": (changed(1, inputs={"model.policy.path": "sft"}), ["reward", "ppo"]),
    "options": (changed(3, options={"model.iterations": 4}), ["ppo"]),
    "options of the first": (changed(0, options={"trainer.max_steps": 3}), ["sft", "reward", "drawn", "ppo"]),
    "command": (changed(2, command="fit"), ["drawn", "ppo"]),
    "seed_keys": (changed(2, seed_keys=["prompts.split.seed"]), ["drawn", "ppo"]),
    "no seed_keys": (changed(2, seed_keys=None), ["drawn", "ppo"]),
}
# The same of the pipeline; a stage with seed keys of its own does not receive the others, nor a `sample` the options.
SETTINGS = {
    "seed_everything": (1, ["sft", "reward", "drawn", "ppo"]),
    "seed_keys": (["data.source.seed"], ["sft", "reward", "drawn", "ppo"]),
    "options": ({"trainer.accelerator": "cpu"}, ["sft", "reward", "drawn", "ppo"]),
}
WITHOUT_PART = {"stages", "output", "evaluation", "overwrite", "seeds", "report"}  # read elsewhere, or after the stages


def test_every_part_is_here():
    assert {field.name for field in fields(Stage)} - {"name"} <= set(CHANGES)
    assert set(inspect.signature(pipeline).parameters) - WITHOUT_PART == set(SETTINGS)


def assert_made_anew(ran, stages, output, expected, **settings):
    ran.clear()
    with pytest.raises(UserError, match=f"{expected[0]} holds a run with other settings"):
        pipeline(stages, output, **settings)
    assert ran == []
    pipeline(stages, output, overwrite=True, **settings)
    assert ran == expected
    pipeline(stages, output, **settings)
    assert ran == expected


@pytest.mark.parametrize("part", CHANGES)
def test_a_changed_stage_is_made_anew_with_all_that_build_on_it(ran, stages, tmp_path, part):
    output = str(tmp_path / "out")
    pipeline(stages, output)
    assert ran == ["sft", "reward", "drawn", "ppo"]
    change, expected = CHANGES[part]
    assert_made_anew(ran, change(stages), output, expected)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_of_all_stages_makes_all_of_them_anew(ran, stages, tmp_path, name):
    output = str(tmp_path / "out")
    pipeline(stages, output)
    value, expected = SETTINGS[name]
    assert_made_anew(ran, stages, output, expected, **{name: value})


def test_nothing_is_made_anew_for_another_spelling_or_a_later_file_time(ran, stages, tmp_path, monkeypatch):
    pipeline(stages, str(tmp_path / "out"))
    ran.clear()
    for config in {path for stage in stages for path in stage.config}:
        Path(config).touch()
    pipeline(stages, f"{tmp_path}/./out/", evaluation=None)
    monkeypatch.chdir(tmp_path)
    pipeline(stages, "out")
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    pipeline(stages, "elsewhere")
    assert ran == []


@pytest.mark.parametrize("named_by", ["config", "option"])
@pytest.mark.parametrize("file", ["rows.jsonl", "model/model.safetensors"])
def test_a_stage_whose_rows_or_model_have_changed_is_made_anew(ran, stages, tmp_path, file, named_by):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    changing = tmp_path / file
    changing.write_text("1")
    value = str(changing if file == "rows.jsonl" else changing.parent)
    if named_by == "config":
        Path(stages[1].config[0]).write_text(f"model: {{network: [{{path: {value}}}]}}\n")
    else:
        stages = changed(1, options={"data.source": value})(stages)
    output = str(tmp_path / "out")
    pipeline(stages, output)
    changing.touch()
    pipeline(stages, output)
    changing.write_text("2")
    assert_made_anew(ran, stages, output, ["reward", "ppo"])


def test_a_stage_whose_product_is_gone_is_made_anew(ran, stages, tmp_path):
    pipeline(stages, str(tmp_path / "out"))
    ran.clear()
    (tmp_path / "out/reward/export/config.json").unlink()
    pipeline(stages, str(tmp_path / "out"))
    assert ran == ["reward"]
