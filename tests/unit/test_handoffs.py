"""What a pipeline checks between two stages, and keeps when what follows the stages fails."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from rlhf_lightning.commands import pipeline as command
from rlhf_lightning.commands.handoffs import check_export
from rlhf_lightning.commands.pipeline import Stage, pipeline
from rlhf_lightning.data.splits import Split
from rlhf_lightning.data.tokenizers import load_tokenizer
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.evaluation import Evaluation, RewardEvaluation, by_task
from rlhf_lightning.models.export import export_folder, export_members
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.worlds import world_tokenizer

FIELDS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
LLAMA = ModelSpec(architecture={"model_type": "llama", "max_position_embeddings": 128, **FIELDS})


def scalar(**more):
    return load_scalar_model(LLAMA, world_tokenizer(), new_head=True, **more)


def test_an_ensemble_with_trunks_of_their_own_is_handed_over(tmp_path):
    made = export_members([(scalar(), None), (scalar(), None)], world_tokenizer(), tmp_path / "reward/export")
    assert "2 members: LlamaForSequenceClassification" in check_export(made)
    assert Stage("reward", []).finished(tmp_path)
    (made / "member_1/model.safetensors").unlink()
    (made / "member_1/config.json").unlink()
    with pytest.raises(UserError, match="member_1 holds no exported model"):
        check_export(made)


def test_an_encoder_has_a_head_of_another_name(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abc", "user", "assistant", ":"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path / "base")
    BertForMaskedLM(BertConfig(vocab_size=len(words), **FIELDS)).save_pretrained(tmp_path / "base")
    tokenizer = load_tokenizer(str(tmp_path / "base"))
    network = load_scalar_model(ModelSpec(path=str(tmp_path / "base")), tokenizer, new_head=True)
    made = export_folder(network, tokenizer, tmp_path / "export")
    assert "BertForSequenceClassification" in check_export(made)
    state = {name: value for name, value in network.state_dict().items() if not name.startswith("classifier")}
    network.save_pretrained(made, state_dict=state)
    with pytest.raises(UserError, match="the reward head is not in the checkpoint"):
        check_export(made)


def test_an_adapter_alone_is_no_model_for_the_next_stage(tmp_path):
    adapter = tmp_path / "sft/export/adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    assert Stage("sft", []).finished(tmp_path)  # it has ended, whatever it made
    with pytest.raises(
        UserError, match=r"adapter alone.*rlhf_lightning export --run .*sft, and leave export.merge out"
    ):
        check_export(tmp_path / "sft/export")


def test_folders_of_a_pipeline_are_told_apart(tmp_path):
    tokenizer = world_tokenizer()
    process = scalar()
    process.config.step_separator = ";"
    exports = {
        "sft": export_folder(load_causal_lm(LLAMA, tokenizer), tokenizer, tmp_path / "sft"),
        "process": export_folder(process, tokenizer, tmp_path / "process"),
        "own": export_members([(scalar(), None), (scalar(), None)], tokenizer, tmp_path / "own"),
        "shared": export_folder(scalar(members=3), tokenizer, tmp_path / "shared"),
    }
    policies, reward_models = by_task(exports)
    assert (list(policies), list(reward_models)) == (["sft"], ["own", "shared"])
    with pytest.raises(UserError, match="no stage trains a policy"):
        by_task({"own": exports["own"]})
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"who owns the {word} ?"}) + "\n" for word in ("kite", "book", "hat"))
    )
    for ensemble in ("own", "shared"):
        evaluation = RewardEvaluation(str(file), None, samples=1, max_new_tokens=2, split=Split(validation=0.6))
        report = evaluation.run({"sft": exports["sft"], "reward": exports[ensemble]}, seed=0)
        assert torch.isfinite(torch.tensor(report["policies"]["sft"]["held_out/sampled"]["score"]["mean"]))


class Fails(Evaluation):
    def __init__(self, error):
        self.error = error

    def run(self, exports, seed):
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("planted\nmore"), UserError("planted")])
def test_an_evaluation_that_fails_keeps_the_stages(tmp_path, monkeypatch, error):
    """The second call skips them."""
    ran = []

    def fit(command_line):
        ran.append(command_line)
        export_folder(load_causal_lm(LLAMA, world_tokenizer()), world_tokenizer(), tmp_path / "out/sft/export")
        (tmp_path / "out/sft/config.yaml").write_text("{}")
        return 0

    monkeypatch.setattr(command, "run_fit", fit)
    stages = [Stage("sft", [str(Path(__file__).parents[2] / "configs/base.yaml")])]
    for _ in range(2):
        with pytest.raises(UserError, match=r"planted; the stages are finished and kept in .*out: .*the same command"):
            pipeline(stages, str(tmp_path / "out"), evaluation=Fails(error))
    assert len(ran) == 1


def test_what_an_evaluation_lacks_is_found_before_the_first_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "run_fit", lambda command_line: pytest.fail("a stage ran"))
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    stages = [Stage("sft", [str(Path(__file__).parents[2] / "configs/base.yaml")])]
    with pytest.raises(UserError, match="no prompt is held out"):
        pipeline(stages, str(tmp_path / "out"), evaluation=RewardEvaluation(str(file), split=Split(validation=0)))
