"""An export replaces an earlier export, and never anything else of the user's."""

import json

import pytest

from rlhf_lightning.cli import main
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.export import check_replaceable, export_folder, export_members
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.worlds import world_tokenizer

FIELDS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
LLAMA = ModelSpec(architecture={"model_type": "llama", "max_position_embeddings": 128, **FIELDS})


@pytest.fixture
def policy():
    return load_causal_lm(LLAMA, world_tokenizer())


def test_an_earlier_export_is_replaced(policy, tmp_path):
    member = load_scalar_model(LLAMA, world_tokenizer(), new_head=True)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "new/deep/export", tmp_path / "empty"):
        for _ in range(2):
            export_folder(policy, world_tokenizer(), folder)
            export_members([(member, None), (member, None)], world_tokenizer(), folder)
    (tmp_path / "adapter/adapter").mkdir(parents=True)
    (tmp_path / "adapter/adapter/adapter_config.json").write_text("{}")
    check_replaceable(tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["a file", "a folder", "a run", "under a file"])
def test_anything_else_is_left_alone(policy, tmp_path, kind):
    place = tmp_path / "mine"
    if kind == "a folder":
        place.mkdir()
    if kind == "a run":
        (place / "checkpoints").mkdir(parents=True)
        (place / "config.json").write_text("{}")
    kept = place if kind in ("a file", "under a file") else place / "thesis.txt"
    kept.write_text("years of work")
    target = place / "export" if kind == "under a file" else place
    for write in (check_replaceable, lambda folder: export_folder(policy, world_tokenizer(), folder)):
        with pytest.raises(UserError, match=r"is a file|holds something else|can't be written"):
            write(target)
    assert kept.read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("place", ["mine", "base"])
def test_a_run_is_refused_before_its_first_step(policy, tmp_path, capsys, place):
    export_folder(policy, world_tokenizer(), tmp_path / "base")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "who owns the kite ?", "completion": "the teacher ."}) + "\n")
    args = ["fit", "--model", "SFTModule", "--model.policy.path", str(tmp_path / "base"), "--data", "DemonstrationDataModule",
            "--data.source", str(rows), "--data.split.validation", "0", "--trainer.default_root_dir", str(tmp_path / "run"),
            "--export.folder", str(tmp_path / place), "--wandb", "disabled", "--trainer.accelerator", "cpu"]  # fmt: skip
    with pytest.raises(SystemExit):
        main(args)
    said = capsys.readouterr().err
    assert ("holds something else" if place == "mine" else "is the model that the run begins with") in said
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "base/model.safetensors").is_file()
