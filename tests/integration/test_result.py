"""What a fit prints at its end, and the validations before, during and after a run that it is made of."""

import csv
import shlex
from pathlib import Path

import pytest
import yaml

from rlhf_lightning import cli
from rlhf_lightning.commands.fit_process import IN_PIPELINE
from rlhf_lightning.commands.result import changes_of, next_commands
from rlhf_lightning.modules import DPOModule, PPOModule, ProcessRewardModule, RewardModelModule, SFTModule
from tests.integration.test_runs import SFT
from tests.resume.runs import arguments, make_base

ROOT = Path(__file__).parents[2]
COMPLETE = ["--trainer.num_sanity_val_steps", "-1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def sft(folder, *more):
    cli.main(
        ["fit", *SFT, *COMPLETE, "--trainer.default_root_dir", str(folder), "--trainer.log_every_n_steps", "10", *more]
    )
    return folder


def printed_table(text):
    """Values of the table by metric, and its header."""
    lines = [line.split() for line in text.splitlines()]
    header = next(line for line in lines if line[:1] == ["metric"])
    return {line[0]: line[1:] for line in lines if line and line[0].startswith(("eval/", "train/"))}, header


def test_a_short_fit_ends_with_metrics_before_and_after_the_export_and_the_next_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = sft(tmp_path / "run", "--trainer.max_steps", "3")
    text, logged = capsys.readouterr().out, rows(folder)
    table, header = printed_table(text)
    before, after = (float(row["eval/loss"]) for row in logged if row["eval/loss"])
    assert header == ["metric", "step", "0", "step", "3", "change"]
    assert table["eval/loss"] == [f"{before:.4g}", f"{after:.4g}", f"{after - before:+.4g}"]
    (trained,) = [row for row in logged if row["train/loss"]]  # although log_every_n_steps is 10
    assert trained["step"] == "2"
    assert table["train/loss"] == [f"{float(trained['train/loss']):.4g}"]
    export = folder / "export"
    assert f"export: {export}" in text
    commands = [line.split(": ", 1)[1] for line in text.splitlines() if line.strip().startswith(("next:", "or:"))]
    assert shlex.split(commands[1])[3:] == ["chat", "--model", str(export)]
    with pytest.raises(SystemExit) as exit_:
        cli.main([*shlex.split(commands[0])[3:], "--print_config"])
    assert exit_.value.code == 0
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert model["class_path"].endswith("RewardModelModule")
    assert model["init_args"]["network"]["path"] == str(export)


def test_a_resumed_run_ends_with_its_first_and_its_last_metrics(tmp_path, capsys):
    folder = sft(tmp_path / "run", "--trainer.max_steps", "2")
    first, _ = printed_table(capsys.readouterr().out)
    sft(folder, "--trainer.max_steps", "5", "--ckpt_path", "last")
    text = capsys.readouterr().out
    table, header = printed_table(text)
    assert header[1:5] == ["step", "0", "step", "5"]
    assert table["eval/loss"][0] == first["eval/loss"][0]
    assert [row["step"] for row in rows(folder) if row["eval/loss"]] == ["0", "2", "5"]
    sft(folder, "--trainer.max_steps", "5", "--ckpt_path", "last")  # it is over
    again = capsys.readouterr().out
    assert printed_table(again)[0].keys() == {name for name in table if name.startswith("eval/")}
    assert printed_table(again)[0]["eval/loss"] == table["eval/loss"]
    assert "export:" in again


def test_a_run_resumed_between_epochs_does_not_repeat_the_validation_before_training(tmp_path):
    """Lightning does, and the row would be one more than in the uninterrupted run."""
    epochs = ["--trainer.limit_train_batches", "2", "--trainer.max_epochs"]
    folder = sft(tmp_path / "run", *epochs, "1")
    sft(folder, *epochs, "2", "--ckpt_path", "last")
    assert [row["step"] for row in rows(folder) if row["eval/loss"]] == ["0", "2", "4"]


def test_the_best_checkpoint_is_named_and_other_ranks_and_stages_print_less(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(IN_PIPELINE, "1")
    sft(tmp_path / "run", "--trainer.max_steps", "1", "--checkpoint.monitor", "eval/loss")
    text = capsys.readouterr().out
    assert "(best: eval/loss" in text
    assert "next:" not in text
    assert "export:" in text


def test_without_validation_the_training_metrics_are_shown(tmp_path, capsys):
    sft(tmp_path / "run", "--trainer.max_steps", "12", "--trainer.limit_val_batches", "0")
    table, header = printed_table(capsys.readouterr().out)
    assert header == ["metric", "step", "9", "step", "11", "change"]
    assert set(table) == {"train/loss", "train/mean_token_accuracy"}


def test_first_and_last_values_come_from_different_rows():
    found = [
        {"step": "0", "eval/loss": "3", "eval/once": "", "train/loss": "", "train/other": ""},
        {"step": "4", "eval/loss": "", "eval/once": "7", "train/loss": "2", "train/other": "1"},
        {"step": "5.0", "eval/loss": "1.5", "eval/once": "", "train/loss": "1", "train/other": "1"},
    ]
    assert [tuple(change) for change in changes_of(found, ["loss"])] == [
        ("eval/loss", 3.0, 0, 1.5, 5),
        ("eval/once", 7.0, 4, 7.0, 4),
        ("train/loss", 2.0, 4, 1.0, 5),
    ]


@pytest.mark.parametrize(
    ("kind", "config", "wanted"),
    [
        (
            SFTModule,
            "quickstart/sft.yaml",
            ["fit -c configs/quickstart/reward.yaml --model.network.path {}", "chat --model {}"],
        ),
        (
            RewardModelModule,
            "recipes/own_reward.yaml",
            [
                "fit -c configs/recipes/own_ppo.yaml --model.policy.path start --model.critic.path {} --model.reward.path {} "
                "--data.source PROMPTS.jsonl"
            ],
        ),
        (PPOModule, "recipes/own_ppo.yaml", ["chat --model {} --against start"]),
        (DPOModule, "recipes/own_dpo.yaml", ["chat --model {} --against start"]),
        (ProcessRewardModule, "quickstart/sums/process_reward.yaml", []),
    ],
    ids=["sft", "reward", "ppo", "dpo", "process"],
)
def test_the_next_command_is_of_the_same_family_of_configs(tmp_path, monkeypatch, kind, config, wanted):
    monkeypatch.chdir(ROOT)
    module = kind.__new__(kind)
    vars(module)["model_path"] = "start"
    (tmp_path / "config.json").touch()
    found = next_commands(module, str(tmp_path), [Path("configs", config)])
    assert [shlex.join(command[3:]) for command in found] == [line.replace("{}", str(tmp_path)) for line in wanted]
    (tmp_path / "config.json").unlink()
    assert next_commands(module, str(tmp_path), []) == []


@pytest.mark.parametrize(("method", "metric"), [("sft", "eval/loss"), ("ppo", "eval/sampled/score")])
def test_a_validation_before_training_changes_nothing_that_follows(base, tmp_path, method, metric):
    """Also where random numbers are drawn: responses of PPO, batches of SFT."""
    short = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "6", "--samples.every_n_steps", "0"]
    for name, steps in (("without", "0"), ("with", "-1")):
        cli.main(arguments(method, base, tmp_path / name, *short, "--trainer.num_sanity_val_steps", steps))
    start, *following = rows(tmp_path / "with")
    assert (start["step"], start[metric] != "") == ("0", True)
    assert following == rows(tmp_path / "without")
    assert len(following) >= 3


@pytest.mark.parametrize("recipe", ["own_ppo", "own_grpo"])
def test_recipes_of_sampling_methods_validate_at_the_start_at_intervals_and_at_the_end(base, tmp_path, recipe):
    folder = tmp_path / "run"
    paths = ["--model.policy.path", str(base / "policy"), "--model.reward.path", str(base / "reward")]
    paths += ["--model.critic.path", str(base / "reward")] if recipe == "own_ppo" else ["--model.groups.size", "2"]
    cli.main(
        [
            "fit", "-c", str(ROOT / f"configs/recipes/{recipe}.yaml"), *paths, "--data.source", "HHHWorld",
            "--data.source.prompts", "12", "--data.source.held_out", "8", "--data.batch_size", "4", "--model.iterations", "5",
            "--model.sampling.max_new_tokens", "4", "--trainer.val_check_interval", "2", "--trainer.accelerator", "cpu",
            "--wandb", "disabled", "--trainer.enable_progress_bar", "false", "--samples.every_n_steps", "0",
            "--trainer.default_root_dir", str(folder),
        ]
    )  # fmt: skip
    iterations, validations = 0, []
    for row in rows(folder):
        iterations = int(float(row["train/iteration"])) if row["train/iteration"] else iterations
        validations += [iterations] if row["eval/sampled/score"] else []
    assert validations == [0, 2, 4, 5]


SAMPLING = [
    file
    for folder in ("recipes", "quickstart")
    for file in sorted((ROOT / "configs" / folder).glob("*.yaml"))
    if "\n    iterations: " in file.read_text()
]


@pytest.mark.parametrize("file", SAMPLING, ids=lambda file: file.stem)
def test_configs_of_sampling_methods_validate_at_the_start_and_every_n_iterations(file):
    config = yaml.safe_load(file.read_text())
    trainer = config["trainer"]
    assert trainer["num_sanity_val_steps"] == -1
    assert trainer["check_val_every_n_epoch"] is None
    assert 2 <= trainer["val_check_interval"] <= config["model"]["init_args"]["iterations"] // 2
