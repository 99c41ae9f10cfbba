"""SIGTERM: the batch is finished, the state saved, one line says how to go on, the exit code is 0, nothing is exported."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rlhf_lightning.cli import main, without_option
from tests.resume.runs import ARCHITECTURE, BRIEF, Signal, differences

ROOT = Path(__file__).parents[2]


def said(run):
    (line,) = [line for line in run.log.read_text().splitlines() if line.startswith("stopped by SIGTERM")]
    return line


def stopped(crew, method, name, *where, more=()):
    run, folder = crew.run(method, name, *more, die=Signal(*where, signal.SIGTERM))
    assert run.join() == [0], run.log.read_text()[-3000:]
    assert not (folder / "export").exists()
    return run, folder


@pytest.mark.parametrize("where", [("batch", 9), pytest.param(("validation", 1), marks=pytest.mark.slow)])
def test_the_line_that_it_ends_with_is_the_command_that_goes_on(crew, whole, where):
    """The second is the validation before the training, where Lightning's own handler waits."""
    run, folder = stopped(crew, "sft", f"sft-term-{where[0]}", *where)
    before, _, command = said(run).partition("; go on with: ")
    assert before.endswith(str(folder / "checkpoints" / "last.ckpt"))
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "rlhf_lightning", "fit"]
    again = crew.again(words[3:], "sft")
    assert again.join() == [0]
    assert differences(whole("sft"), folder) == []


# With batch 4 a validation is due, which may take longer than we are given: it is left to the run that goes on.
@pytest.mark.slow
@pytest.mark.parametrize(
    "where", [("batch", 4), ("batch", 12), ("batch", 13), ("validation", 4), ("epoch end", 1)], ids=str
)
@pytest.mark.parametrize("method", BRIEF)
def test_nothing_is_lost_wherever_it_comes(crew, whole, method, where):
    _, folder = stopped(crew, method, f"{method}-term-{where[0]}-{where[1]}", *where)
    assert crew.go_on(method, folder.name).join() == [0]
    assert differences(whole(method), folder) == []


@pytest.mark.slow
def test_asked_at_the_very_end_the_next_one_only_exports(crew, whole):
    _, folder = stopped(crew, "sft", "sft-term-end", "epoch end", 2)
    run = crew.go_on("sft", folder.name)
    assert run.join() == [0]
    assert "the run had come to its end before, at optimizer step 12" in run.log.read_text()
    assert differences(whole("sft"), folder) == []


@pytest.mark.slow
def test_a_last_validation_that_was_stopped_is_made_up_for(crew, whole):
    """The run would end without any validation, and is asked to end in the one after its last step."""
    more = ("--trainer.max_steps", "1", "--trainer.num_sanity_val_steps", "0")
    _, folder = stopped(crew, "sft", "sft-term-last-validation", "validation", 1, more=more)
    assert "eval/loss" not in (folder / "metrics.csv").read_text()
    assert crew.go_on("sft", folder.name, *more).join() == [0]
    assert (folder / "metrics.csv").read_text() == (whole("sft", *more) / "metrics.csv").read_text()
    assert "eval/loss" in (folder / "metrics.csv").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("method", ["sft", "ppo"])
def test_one_rank_is_asked_and_all_of_them_stop(crew, whole, method, rank):
    run, folder = crew.run(method, f"{method}-term-rank-{rank}", ranks=2)
    run.wait_for("batch" if method == "sft" else "update")
    run.terminate(rank)
    assert run.join() == [0, 0], run.log.read_text()[-3000:]
    assert said(run)
    assert not (folder / "export").exists()
    assert crew.go_on(method, folder.name, ranks=2).join() == [0, 0]
    assert differences(whole(method, ranks=2), folder) == []


@pytest.mark.slow
def test_a_pipeline_hands_it_on_and_does_not_take_the_stage_for_finished(tmp_path):
    stage = {
        "model": {"class_path": "SFTModule", "init_args": {"policy": {"architecture": ARCHITECTURE}}},
        "data": {"class_path": "DemonstrationDataModule", "init_args": {"source": "HHHWorld", "batch_size": 4}},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        "checkpoint": {"every_n_batches": 2},
        "samples": {"every_n_steps": 0},
        "wandb": "disabled",
    }
    stage["data"]["init_args"]["source"] = {
        "class_path": "HHHWorld",
        "init_args": {"demonstrations": 800, "held_out": 4},
    }
    plan = {"stages": [{"name": "sft", "config": [str(tmp_path / "sft.yaml")]}], "output": str(tmp_path / "runs")}
    for name, content in (("sft", stage), ("pipeline", plan)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "rlhf_lightning", "pipeline", "-c", str(tmp_path / "pipeline.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "runs/sft/checkpoints/last.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "stage sft was stopped before its end; go on with: python -m rlhf_lightning pipeline -c" in printed
    assert not json.loads((tmp_path / "runs/stages.json").read_text())["sft"]["finished"]
    again = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert "--ckpt_path last" in again.stdout
    assert json.loads((tmp_path / "runs/stages.json").read_text())["sft"]["finished"]
    assert (tmp_path / "runs/sft/export/config.json").is_file()


@pytest.mark.parametrize(
    ("args", "rest"),
    [
        (["fit", "--ckpt_path", "last", "--a", "1"], ["fit", "--a", "1"]),
        (["fit", "--ckpt_path=x.ckpt"], ["fit"]),
        (["fit", "--a", "1"], ["fit", "--a", "1"]),
    ],
)
def test_the_option_that_is_given_anew_is_taken_out(args, rest):
    assert without_option(args, "--ckpt_path") == rest


def test_a_run_without_a_checkpoint_can_not_go_on(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--model", "SFTModule", "--model.policy", "x", "--data", "DemonstrationDataModule", "--data.source",
              "HHHWorld", "--trainer.default_root_dir", str(tmp_path), "--ckpt_path", "last"])  # fmt: skip
    assert exit_.value.code == 2
    assert "there is no" in capsys.readouterr().err
