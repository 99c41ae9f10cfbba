"""A run's folder: what a fit leaves, going on with it, and predictions."""

import csv
import json

import pytest
import torch

from rlhf_lightning.cli import main

ARCHITECTURE = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SFT = [
    "--model",
    "SFTModule",
    "--model.policy.architecture",
    json.dumps(ARCHITECTURE),
    "--model.sampling.max_new_tokens",
    "4",
]
SFT += ["--data", "DemonstrationDataModule", "--data.source", "HHHWorld", "--data.source.demonstrations", "64"]
SFT += ["--data.source.held_out", "8", "--data.batch_size", "8", "--trainer.accelerator", "cpu", "--wandb", "disabled"]
SFT += ["--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1", "--samples.every_n_steps", "0"]


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["train/loss"]]


def test_a_run_goes_on_where_it_stopped_and_keeps_its_metrics(tmp_path):
    first = ["fit", *SFT, "--trainer.default_root_dir", str(tmp_path / "a"), "--trainer.max_steps"]
    main([*first, "4"])
    main([*first, "8", "--ckpt_path", "last"])
    steps = [int(row["step"]) for row in rows(tmp_path / "a")]
    assert steps == list(range(8))
    assert [row["train/num_tokens"] for row in rows(tmp_path / "a")] == sorted(
        (row["train/num_tokens"] for row in rows(tmp_path / "a")), key=float
    )


def test_checkpoints_hold_weights_and_counters_and_load_without_pickle(tmp_path):
    main(["fit", *SFT, "--trainer.default_root_dir", str(tmp_path / "a"), "--trainer.max_steps", "2"])
    checkpoint = torch.load(tmp_path / "a/checkpoints/last.ckpt", weights_only=True)
    assert "hyper_parameters" not in checkpoint
    assert all(key.startswith("policy.") for key in checkpoint["state_dict"])
    assert checkpoint["run"]["module"] == "rlhf_lightning.modules.sft.SFTModule"
    assert len(checkpoint["run"]["ranks"]) == 1


def test_going_on_with_nothing_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["fit", *SFT, "--trainer.default_root_dir", str(tmp_path / "a"), "--ckpt_path", "last"])
    assert "there is no" in capsys.readouterr().err


def test_predict_writes_a_line_a_sample_and_never_over_another(tmp_path, capsys):
    args = ["predict", *SFT, "--trainer.default_root_dir", str(tmp_path / "a")]
    main(args)
    lines = [json.loads(line) for line in (tmp_path / "a/predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert set(lines[0]) == {"row", "side", "prompt", "response", "score"}
    assert all(line["prompt"] for line in lines)
    with pytest.raises(SystemExit):
        main(args)
    assert "predictions.jsonl exists" in capsys.readouterr().err


def test_a_world_larger_than_its_batches_is_seen_once_an_epoch(tmp_path):
    main(["fit", *SFT, "--trainer.default_root_dir", str(tmp_path / "a"), "--trainer.max_epochs", "1"])
    assert len(rows(tmp_path / "a")) == 64 // 8
