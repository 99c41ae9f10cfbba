"""`ground-truth` refuses, before any training and in one line, whatever has no known optimum to be held against."""

from pathlib import Path

import pytest
import yaml

from rlhf_lightning.cli import main
from rlhf_lightning.evaluation.exact import Exact
from rlhf_lightning.evaluation.ground_truth import verdict

CONFIGS = Path(__file__).parents[2] / "configs"
PPO, DPO = (CONFIGS / "ground_truth" / f"{name}.yaml" for name in ("ppo", "dpo"))


def refusal(capsys, *args):
    with pytest.raises(SystemExit) as exit_:
        main(["ground-truth", *map(str, args)])
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.init_args.kl", "AdaptiveKL"], "give model.kl a FixedKL"),
        (["--model.init_args.kl.init_args.coef", "0"], "positive"),
        (["--model.init_args.sampling.max_new_tokens", "5"], "set model.sampling.max_new_tokens"),
        (["--model.init_args.loss.entropy_coef", "0.1"], "entropy_coef"),
        (["--model.init_args.advantages.init_args.gamma", "0.9"], "gamma"),
        (["--model.init_args.reward.init_args.world.init_args.seed", "5"], "the world of data.source"),
        (["--trainer.callbacks", "[]"], "OptimumCurve"),
        (["--ckpt_path", "x.ckpt"], "leave --ckpt_path out"),
        (["--problems", "many"], "--problems"),
        (["--model.init_args.nonsense", "1"], "nonsense"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_of_ppo(capsys, tmp_path, flags, message):
    assert message in refusal(capsys, "-c", PPO, *flags, "--trainer.default_root_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_of_dpo_with_smoothed_labels(capsys):
    assert "label_smoothing" in refusal(capsys, "-c", DPO, "--model.init_args.loss.init_args.label_smoothing", "0.1")


def test_of_a_module_without_a_known_optimum(capsys, tmp_path):
    config = yaml.safe_load(DPO.read_text())
    network = config["model"]["init_args"]["policy"]
    config["model"] = {"class_path": "RewardModelModule", "init_args": {"network": network}}
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump(config))
    assert "RewardModelModule has no known optimum" in refusal(capsys, "-c", tmp_path / "reward.yaml")


def test_of_a_world_that_cannot_be_enumerated(capsys):
    line = refusal(capsys, "-c", DPO, "--data.init_args.source", "HHHWorld")
    assert "data.source is HHHWorld" in line


def test_of_a_folder_that_holds_something_else(capsys, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    flags = ["-c", DPO, "--trainer.default_root_dir", tmp_path, "--overwrite", "true"]
    assert "holds no ground-truth run" in refusal(capsys, *flags)
    assert (tmp_path / "thesis.tex").exists()


def test_a_fit_that_was_asked_to_end_is_no_result(capsys, tmp_path, monkeypatch):
    """It ends with 0, as it should after a SIGTERM, and leaves no export to measure."""
    monkeypatch.setattr("rlhf_lightning.commands.ground_truth.run_fit", lambda command: 0)
    flags = ["--data.init_args.source.init_args.max_new_tokens", "2", "--problems", "7"]
    main(["ground-truth", "-c", str(DPO), *flags, "--trainer.default_root_dir", str(tmp_path / "run")])
    assert "problem 7 was stopped before its end" in capsys.readouterr().out
    assert not (tmp_path / "run" / "ground_truth.json").exists()


def test_the_verdict_names_what_is_out_of_tolerance():
    good = Exact(kl_to_optimum=5e-3, lost_percent=1.5, reward=0.5, kl=0.3, frontier_reward=0.51, entropy=3.0)
    assert verdict("PPO", good, 1e-6) == []
    bad = Exact(kl_to_optimum=2e-2, lost_percent=4.0, reward=0.52, kl=0.3, frontier_reward=0.51, entropy=3.0)
    found = verdict("PPO", bad, 2e-5)
    assert [line.split()[0] for line in found] == ["kl_to_optimum", "lost_percent", "gradient_error", "reward"]
    assert [line.split()[0] for line in verdict("DPO", bad, 1e-6)] == ["reward"]
    not_a_number = Exact(float("nan"), 1.0, 0.5, 0.3, 0.51, 3.0)
    assert [line.split()[0] for line in verdict("PPO", not_a_number, 1e-6)] == ["kl_to_optimum"]
