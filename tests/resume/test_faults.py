"""What a run says, and what is left of it, when its checkpoint can't be written or read."""

import shutil

import pytest

from tests.resume.runs import ARCHITECTURE, FULL_DISK, Signal, differences


def error_of(run):
    (line,) = {line for line in run.log.read_text().splitlines() if line.startswith("error: ")}  # each rank's the same
    return line


@pytest.mark.slow
@pytest.mark.parametrize("where", ["checkpoint bytes", "checkpoint flush"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_fills_during_a_run_costs_the_batches_since_the_last_checkpoint(crew, whole, where, ranks):
    run, folder = crew.run("sft", f"sft-full-{where[11:]}-{ranks}", ranks=ranks, die=Signal(where, 2, FULL_DISK))
    assert run.join() == [2] * ranks
    last = folder / "checkpoints" / "last.ckpt"
    assert f"{last} could not be written: No space left on device" in error_of(run)
    assert "--ckpt_path last" in error_of(run)
    assert "Traceback" not in run.log.read_text()
    assert not [path for path in last.parent.iterdir() if path.name.startswith(".")]
    assert crew.go_on("sft", folder.name, ranks=ranks).join() == [0] * ranks
    assert differences(whole("sft", ranks=ranks), folder) == []


@pytest.mark.slow
def test_a_torn_last_checkpoint_and_the_one_that_is_offered(crew, whole, tmp_path):
    folder = crew.folder / "sft-torn"
    shutil.copytree(whole("sft"), folder)
    last = folder / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    run = crew.go_on("sft", folder.name)
    assert run.join() == [2]
    said = error_of(run)
    offered = folder / "checkpoints" / "previous.ckpt"
    assert said.startswith(f"error: {last} is damaged")
    assert said.endswith(f"--ckpt_path {offered}")
    run, _ = crew.run("sft", folder.name, "--ckpt_path", str(offered))
    assert run.join() == [0]
    assert differences(whole("sft"), folder) == []


@pytest.mark.slow
def test_a_checkpoint_of_another_method_or_model_is_refused(crew, whole):
    last = str(whole("sft") / "checkpoints" / "last.ckpt")
    run, _ = crew.run("dpo", "dpo-of-sft", "--ckpt_path", last)
    assert run.join() == [2]
    assert (
        f"{last} is of a rlhf_lightning.modules.sft.SFTModule, not of a rlhf_lightning.modules.dpo.DPOModule"
        in error_of(run)
    )
    wider = ["--model.policy.architecture.hidden_size", str(2 * ARCHITECTURE["hidden_size"])]
    run, _ = crew.run("sft", "sft-wider", *wider, "--ckpt_path", last)
    assert run.join() == [2]
    assert "is of another model: policy.network." in error_of(run)
