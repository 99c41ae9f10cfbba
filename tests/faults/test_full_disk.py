"""A disk that fills while an export is written: the old one stays whole, nothing half-written does, one line says why."""

import json
import os
import resource
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.cli import main
from rlhf_lightning.errors import UserError
from rlhf_lightning.models import export as export_file
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.worlds import world_tokenizer

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


@contextmanager
def no_file_above(size: int):
    """As on a disk that is full after so many bytes: the kernel refuses what goes beyond."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def network(seed: int):
    torch.manual_seed(seed)
    return load_causal_lm(ModelSpec(architecture=TINY), world_tokenizer())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("size", [0, 400, 3000, 8000], ids=lambda n: f"{n} bytes")
def test_the_old_export_stays_and_nothing_else_does(tmp_path, size):
    """The limits are met by different files: config, tokenizer, weights."""
    folder = export_folder(network(0), world_tokenizer(), tmp_path / "export")
    before = contents(folder)
    assert max(map(len, before.values())) > 8000
    with pytest.raises(UserError, match=r"can't be written \(.*arge") as caught:
        with no_file_above(size):
            export_folder(network(1), world_tokenizer(), folder)
    assert str(folder) in str(caught.value)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("size", [0, 400, 3000, 8000])
def test_a_first_export_leaves_nothing_behind(tmp_path, size):
    with pytest.raises(UserError), no_file_above(size):
        export_folder(network(1), world_tokenizer(), tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [PreTrainedModel, PreTrainedTokenizerBase])
def test_whichever_writer_fails(tmp_path, monkeypatch, kind):
    folder = export_folder(network(0), world_tokenizer(), tmp_path / "export")
    before = contents(folder)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kind, "save_pretrained", full)
    with pytest.raises(UserError, match="No space left on device"):
        export_folder(network(1), world_tokenizer(), folder)
    assert contents(folder) == before


def test_the_old_export_comes_back_if_the_new_one_can_not_take_its_place(tmp_path, monkeypatch):
    folder = export_folder(network(0), world_tokenizer(), tmp_path / "export")
    before, replace = contents(folder), os.replace

    def refuse_the_new(source, target):
        if os.path.basename(source).startswith(".export.") and not str(source).endswith(".old"):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(export_file.os, "replace", refuse_the_new)
    with pytest.raises(UserError, match="Input/output error"):
        export_folder(network(1), world_tokenizer(), folder)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_mistake_of_ours_is_not_told_as_a_full_disk(tmp_path, monkeypatch):
    def wrong(*_, **__):
        raise KeyError("weights")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", wrong)
    with pytest.raises(KeyError):
        export_folder(network(1), world_tokenizer(), tmp_path / "export")


def test_a_run_says_how_to_write_its_export_again_and_that_works(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    args = [
        "--model",
        "SFTModule",
        "--model.policy.architecture",
        json.dumps(TINY),
        "--data",
        "DemonstrationDataModule",
    ]
    args += ["--data.source", "HHHWorld", "--data.source.demonstrations", "16", "--data.source.held_out", "4"]
    args += [
        "--trainer.accelerator",
        "cpu",
        "--trainer.max_steps",
        "1",
        "--wandb",
        "disabled",
        "--samples.every_n_steps",
        "0",
    ]
    args += ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(run)]

    def on_a_full_disk(*given):
        with no_file_above(3000):
            return export_folder(*given)

    with monkeypatch.context() as patch:
        patch.setattr("rlhf_lightning.callbacks.export.export_folder", on_a_full_disk)
        with pytest.raises(SystemExit) as exit_:
            main(["fit", *args])
    assert exit_.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert not (run / "export").exists()
    command = said.partition("python -m rlhf_lightning ")[2].split()
    assert command == ["export", "--run", str(run)]
    main(command)
    exported = AutoModelForCausalLM.from_pretrained(run / "export").state_dict()
    trained = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, weight in exported.items():
        assert torch.equal(weight, trained[f"policy.network.{name}"]), name
