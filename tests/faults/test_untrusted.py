"""Files from somebody else: no pickle among them is ever loaded, and no code that comes with a model is run unasked."""

import json
import os
import pickle
import zipfile
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import Namespace

from rlhf_lightning.cli import main
from rlhf_lightning.commands.imports import check_checkpoint
from rlhf_lightning.data.sources import FileSource
from rlhf_lightning.data.tokenizers import load_tokenizer
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.worlds import world_tokenizer

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
SFT = ["--model", "SFTModule", "--model.policy.architecture", json.dumps(TINY), "--data", "DemonstrationDataModule"]
SFT += ["--data.source", "HHHWorld", "--data.source.demonstrations", "16", "--data.source.held_out", "4"]
SFT += [
    "--trainer.accelerator",
    "cpu",
    "--trainer.max_steps",
    "1",
    "--wandb",
    "disabled",
    "--samples.every_n_steps",
    "0",
]
SFT += ["--trainer.enable_progress_bar", "false"]


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mknod, (self.path,)


@pytest.fixture
def ran(tmp_path):
    return tmp_path / "ran"


def refused(capsys, *args) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(list(args))
    assert exit_.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "sft"
    main(["fit", *SFT, "--trainer.default_root_dir", str(folder)])
    return folder


def malicious(path, ran, form):
    """A checkpoint with a payload, as torch writes it or as a bare pickle."""
    if form == "torch":
        torch.save({"state_dict": {}, "payload": Payload(ran)}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(ran)))
    return str(path)


@pytest.mark.parametrize("form", ["torch", "pickle"])
@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_checkpoint_runs_nothing(tmp_path, capsys, ran, command, form):
    path = malicious(tmp_path / "evil.ckpt", ran, form)
    said = refused(capsys, command, *SFT, "--trainer.default_root_dir", str(tmp_path / "run"), "--ckpt_path", path)
    assert not ran.exists()
    assert "evil.ckpt" in said


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_nor_when_it_is_exported(tmp_path, capsys, ran, run, form):
    path = malicious(tmp_path / "evil.ckpt", ran, form)
    said = refused(capsys, "export", "--run", str(run), "--checkpoint", path, "--output", str(tmp_path / "out"))
    assert not ran.exists()
    assert "evil.ckpt" in said
    assert not (tmp_path / "out").exists()


def test_nobody_can_ask_for_a_pickle(tmp_path, capsys, ran):
    """Lightning would load one for ``weights_only: false``, for a URL by default, and for a sharded folder."""
    path = malicious(tmp_path / "evil.ckpt", ran, "torch")
    asked = ["fit", *SFT, "--trainer.default_root_dir", str(tmp_path / "run"), "--ckpt_path", path]
    (tmp_path / "asked.yaml").write_text("weights_only: false\n")
    assert "weights_only" in refused(capsys, *asked, "--config", str(tmp_path / "asked.yaml"))
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    (sharded / ".metadata").write_bytes(pickle.dumps(Payload(ran)))
    (sharded / "meta.pt").write_bytes(pickle.dumps(Payload(ran)))
    assert "sharded" in refused(capsys, *asked[:-1], str(sharded), "--trainer.strategy", "fsdp2")
    assert not ran.exists()


def test_a_checkpoint_from_the_network_is_no_exception(tmp_path, capsys, monkeypatch):
    seen = {}

    def fetch(url, map_location=None, weights_only=None):
        seen["weights_only"] = weights_only
        raise OSError("no network here")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    there = SimpleNamespace(exists=lambda path: True)
    monkeypatch.setattr("lightning.fabric.plugins.io.torch_io.get_filesystem", lambda path: there)
    args = [*SFT, "--trainer.default_root_dir", str(tmp_path / "run"), "--ckpt_path", "http://127.0.0.1:9/x.ckpt"]
    with pytest.raises((SystemExit, OSError)):
        main(["fit", *args])
    assert seen == {"weights_only": True}


def test_lightning_is_told_so_whatever_its_plugins_do():
    config = Namespace(weights_only=None, ckpt_path=None)  # to Lightning, None is False where the path is a URL
    check_checkpoint(config)
    assert config.weights_only is True


@pytest.fixture
def folder(tmp_path):
    tokenizer = world_tokenizer()
    return export_folder(load_causal_lm(ModelSpec(architecture=TINY), tokenizer), tokenizer, tmp_path / "model")


@pytest.mark.parametrize("load", [load_causal_lm, load_scalar_model])
def test_weights_in_a_pickle_are_not_loaded(folder, ran, load):
    weights = folder / "model.safetensors"
    weights.unlink()
    torch.save({"lm_head.weight": Payload(ran)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load(ModelSpec(path=str(folder)), world_tokenizer())
    assert not ran.exists()


def test_code_that_comes_with_a_model_is_not_run(folder, ran):
    (folder / "modeling_evil.py").write_text(
        f"import os\nos.mknod({str(ran)!r})\nclass EvilConfig: ...\nclass Evil: ...\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.Evil"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"trust_remote_code.*--import") as caught:
        load_causal_lm(ModelSpec(path=str(folder)), world_tokenizer())
    assert str(folder) in str(caught.value)
    assert not ran.exists()


def test_nor_code_that_comes_with_a_tokenizer(folder, ran):
    (folder / "tokenization_evil.py").write_text(f"import os\nos.mknod({str(ran)!r})\nclass Evil: ...\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"brings code of its own, which is not run.*tokenizer_class"):
        load_tokenizer(str(folder))
    assert not ran.exists()


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pt", "rows.pickle", "rows.bin"])
@pytest.mark.parametrize("inside", [False, True], ids=["file", "folder"])
def test_a_dataset_in_a_pickle_is_refused(tmp_path, ran, name, inside):
    place = tmp_path / "data"
    place.mkdir()
    (place / name).write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(UserError, match="accepted are"):
        FileSource(str(place if inside else place / name)).load("demonstrations")
    assert not ran.exists()


def test_a_script_that_comes_with_a_dataset_is_not_run(tmp_path, ran):
    place = tmp_path / "data"
    place.mkdir()
    (place / "data.py").write_text(f"import os\nos.mknod({str(ran)!r})\n")
    (place / "rows.jsonl").write_text('{"text": "a b"}\n')
    with pytest.raises(UserError, match=r"no longer supported.*data.py"):
        FileSource(str(place)).load("demonstrations")
    assert not ran.exists()


def test_the_payload_is_a_real_one(tmp_path, ran):
    """Loaded the unsafe way it does run: else nothing above would be shown."""
    malicious(tmp_path / "evil.ckpt", ran, "torch")
    assert zipfile.is_zipfile(tmp_path / "evil.ckpt")
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    assert ran.exists()
