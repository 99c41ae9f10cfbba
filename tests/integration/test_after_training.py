"""Whatever runs after the last optimizer step may fail, and takes none of the training with it."""

import json
import shlex

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from safetensors.torch import load_file

from rlhf_lightning.callbacks import export
from rlhf_lightning.callbacks.loggers import run_loggers
from rlhf_lightning.cli import main
from rlhf_lightning.modules import RewardModelModule
from rlhf_lightning.rewards.reward import Samples, checked_scores
from rlhf_lightning.rewards.reward_model import RewardModelReward
from rlhf_lightning.worlds import HHHWorld
from tests.resume.runs import MODULES, arguments, differences, make_base

SHORT = [
    "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "4", "--trainer.val_check_interval", "1.0",
    "--trainer.limit_val_batches", "1", "--trainer.num_sanity_val_steps", "0", "--samples.every_n_steps", "0",
]  # fmt: skip
QUICK = ("sft", "reward", "ppo")
METHODS = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODULES]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def command(method, base, run, *more):
    """A run of two optimizer steps or more and one validation, at its end."""
    return arguments(method, base, run, *SHORT, *more)


def module_of(method):
    return MODULES[method]


def fails(*args, **kwargs):
    raise RuntimeError("planted\nfailure")


def failed(args, capsys):
    """The last line that a run says before it ends with a mistake."""
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def check_kept(said, run):
    """The checkpoint is at the last step, the line names it, and the command that it names makes the export."""
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    steps = checkpoint["global_step"]
    assert steps >= 2
    assert f"step {steps}" in said
    assert str(run / "checkpoints/last.ckpt") in said
    assert "planted" in said
    assert "--ckpt_path last" in said
    shown = said.split("python -m rlhf_lightning ")[-1]
    return shlex.split(shown), checkpoint


@pytest.mark.parametrize("method", METHODS)
def test_a_validation_that_fails_at_the_end(method, base, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(module_of(method), "validation_step", fails)
        said = failed(command(method, base, run), capsys)
    written, checkpoint = check_kept(said, run)
    assert written == ["export", "--run", str(run)]
    main(written)
    assert list((run / "export").rglob("config.json"))
    main(command(method, base, run, "--ckpt_path", "last"))  # and the run itself can be completed
    again = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert again["global_step"] == checkpoint["global_step"]
    assert "eval/" in (run / "metrics.csv").read_text()


@pytest.mark.parametrize("method", METHODS)
def test_an_export_that_fails(method, base, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(export, "export_folder", fails)
        patch.setattr(export, "export_members", fails)
        said = failed(command(method, base, run), capsys)
    written, checkpoint = check_kept(said, run)
    main(written)
    (weights, *_) = sorted((run / "export").rglob("model.safetensors"))
    trained = load_file(weights)
    kept = {
        name: value for name, value in checkpoint["state_dict"].items() if name.endswith("layers.0.mlp.up_proj.weight")
    }
    (name, *_) = [name for name in trained if name.endswith("layers.0.mlp.up_proj.weight")]
    assert any(torch.equal(trained[name], value) for value in kept.values())


@pytest.mark.parametrize("method", ["reward", pytest.param("rankings", marks=pytest.mark.slow)])
def test_a_measurement_of_scores_that_fails(method, base, tmp_path, monkeypatch, capsys):
    """The run that goes on repeats it, and then exports what the undisturbed run does."""
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    main(command(method, base, undisturbed))
    with monkeypatch.context() as patch:
        patch.setattr(RewardModelModule, "_scored", fails)
        said = failed(command(method, base, run), capsys)
    check_kept(said, run)
    main(command(method, base, run, "--ckpt_path", "last"))
    assert differences(undisturbed, run) == []
    for config in (run / "export").rglob("config.json"):
        other = undisturbed / config.relative_to(run)
        scales = [
            {k: v for k, v in json.loads(path.read_text()).items() if k.startswith("reward_")}
            for path in (config, other)
        ]
        assert scales[0] == scales[1]
        assert scales[0]["reward_gain"] != 1.0


def test_an_unmeasured_checkpoint_says_so_when_it_is_exported(base, tmp_path, monkeypatch, capsys, caplog):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(RewardModelModule, "_scored", fails)
        failed(command("reward", base, run), capsys)
    main(["export", "--run", str(run)])
    assert "before its scores were normalised" in caplog.text


def mean_and_deviation(export, rows):
    """Of the scores of all chosen and rejected responses."""
    reward = RewardModelReward(str(export))
    reward.prepare("cpu")
    texts = [row[side][-1]["content"] for row in rows for side in ("chosen", "rejected")]
    prompts = [row["prompt"] for row in rows for _ in range(2)]
    scores = checked_scores(reward, Samples(prompts, texts, [[] for _ in texts], [False] * len(texts)))
    return float(scores.mean()), float(scores.std(unbiased=False))


@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.slow)])
def test_a_reward_model_on_a_stream_is_normalised_on_rows_of_the_stream(base, tmp_path, workers):
    splits = HHHWorld(held_out=8, preferences=48).load("preferences")
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "validation")}
    for name, file in files.items():
        file.write_text("".join(json.dumps(row) + "\n" for row in splits[name].to_list()))
    arguments = {"path": str(files["train"]), "validation_path": str(files["validation"]), "window_rows": 16}
    stream = [
        "--data.source", json.dumps({"class_path": "StreamSource", "init_args": arguments}), "--data.num_workers", workers,
        "--data.tokenizer", str(base / "policy"), "--trainer.max_epochs", "-1", "--trainer.max_steps", "2",
        "--trainer.limit_train_batches", "1.0",
    ]  # fmt: skip
    main(command("reward", base, tmp_path / "run", *stream))
    rows = [json.loads(line) for line in files["train"].read_text().splitlines()]
    assert mean_and_deviation(tmp_path / "run/export", rows) == pytest.approx((0.0, 1.0), abs=1e-3)


def test_the_best_reward_model_is_normalised_on_its_own_scores(base, tmp_path):
    """Kept at a validation amid an epoch, when nothing but the last epoch's end was measured before."""
    run = tmp_path / "run"
    more = [
        "--trainer.val_check_interval",
        "2",
        "--trainer.limit_train_batches",
        "7",
        "--checkpoint.monitor",
        "eval/loss",
    ]
    main(command("reward", base, run, *more, "--checkpoint.mode", "max", "--model.optimizer.lr", "0.01"))
    (best,) = (run / "checkpoints").glob("step=*.ckpt")
    assert torch.load(best, weights_only=True)["global_step"] < 4
    main(["export", "--run", str(run), "--checkpoint", str(best), "--output", str(tmp_path / "best")])
    rows = HHHWorld(held_out=8, preferences=48).load("preferences")["train"].to_list()
    assert mean_and_deviation(tmp_path / "best", rows) == pytest.approx((0.0, 1.0), abs=1e-3)


class BrokenEnd(DummyLogger):
    """A logger that works until it is closed."""

    def finalize(self, status):
        raise TypeError("planted")


def test_a_logger_that_cannot_be_closed_does_not_make_the_run_a_failure(caplog):
    _, logger = run_loggers(DummyLogger(), [BrokenEnd()])
    logger.finalize("success")
    assert "BrokenEnd could not be closed" in caplog.text
    assert "planted" in caplog.text
