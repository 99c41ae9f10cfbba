"""Files of `pipeline` parse, with the settings of the report as the user wrote them."""

from pathlib import Path

import pytest
import yaml

from rlhf_lightning.cli import main
from rlhf_lightning.evaluation.thresholds import Threshold, check_names

ROOT = Path(__file__).parents[2]
FILES = ("quickstart/pipeline.yaml", "quickstart/leaderboard.yaml", "recipes/own_pipeline.yaml")


def parsed(capsys, monkeypatch, *args):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        main(["pipeline", *args, "--print_config"])
    assert end.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("name", FILES)
def test_it_parses_and_its_thresholds_are_about_its_stages(name, capsys, monkeypatch):
    file = ROOT / "configs" / name
    config, written = parsed(capsys, monkeypatch, "-c", str(file)), yaml.safe_load(file.read_text())
    assert [stage["name"] for stage in config["stages"]] == [stage["name"] for stage in written["stages"]]
    assert config["report"]["title"] == written.get("report", {}).get("title")
    thresholds = [Threshold(**values) for values in config["report"]["thresholds"] or []]
    assert len(thresholds) == len(written.get("report", {}).get("thresholds", []))
    check_names(thresholds, [stage["name"] for stage in config["stages"]])


def test_title_and_name_of_the_reward_are_flags_too(capsys, monkeypatch):
    flags = ["--report.title", "Mine", "--report.reward", "kindness", "--report.require_thresholds", "true"]
    config = parsed(capsys, monkeypatch, "-c", "configs/recipes/own_pipeline.yaml", *flags)
    assert config["report"] | {"thresholds": None} == {
        "title": "Mine",
        "reward": "kindness",
        "thresholds": None,
        "require_thresholds": True,
    }


def test_a_threshold_of_no_stage_is_refused_before_the_first_one(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = yaml.safe_load((ROOT / "configs/recipes/own_pipeline.yaml").read_text())
    plan |= {"output": str(tmp_path / "run")}
    plan["report"]["thresholds"] = [{"figure": "policies:pppo:held_out/sampled:kl", "high": 9.0}]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(SystemExit) as end:
        main(["pipeline", "-c", str(tmp_path / "plan.yaml")])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "error: report.thresholds: policies:pppo:held_out/sampled:kl names no stage; after policies: comes one of sft, "
        "reward, dpo, ppo\n"
    )
    assert not (tmp_path / "run").exists()
