"""Model specs that can't be met are refused by name; exports load again with plain transformers, or do not happen."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.export import eos_ids, export_folder
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.spec import ModelSpec
from tests.unit.models.adapted import LORA

IDS = torch.tensor([[1, 4, 5, 6, 2]])


@pytest.mark.parametrize("fields", [{}, {"path": "x", "architecture": {"model_type": "llama"}}])
def test_a_spec_is_a_path_or_an_architecture(fields):
    with pytest.raises(UserError, match="not both"):
        ModelSpec(**fields)


def test_an_architecture_needs_a_known_type_and_known_fields(tokenizer):
    with pytest.raises(UserError, match="model_type"):
        ModelSpec(architecture={"hidden_size": 16})
    with pytest.raises(UserError, match="'lama' is unknown"):
        load_causal_lm(ModelSpec(architecture={"model_type": "lama"}), tokenizer)
    with pytest.raises(UserError, match=r"architecture\.hidden_sise"):
        load_causal_lm(ModelSpec(architecture={"model_type": "llama", "hidden_sise": 16}), tokenizer)


@pytest.mark.parametrize("load", [load_causal_lm, load_scalar_model])
def test_a_missing_or_empty_folder_is_named(load, tokenizer, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load(ModelSpec(path=str(tmp_path / "nowhere")), tokenizer)
    with pytest.raises(UserError, match=r"config\.json"):
        load(ModelSpec(path=str(tmp_path)), tokenizer)


def test_a_missing_export_tells_the_command_that_makes_it(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "hhh").mkdir(parents=True)
    (tmp_path / "configs" / "hhh" / "sft.yaml").touch()
    with pytest.raises(UserError, match=r"fit --config configs/hhh/sft\.yaml"):
        load_causal_lm(ModelSpec(path="runs/hhh/sft/export"), tokenizer)


def test_vocabulary_and_special_tokens_come_from_the_tokenizer(causal, tokenizer):
    assert causal.get_input_embeddings().weight.shape[0] == len(tokenizer) == 12
    assert (causal.config.pad_token_id, causal.config.bos_token_id, causal.config.eos_token_id) == (0, 1, 2)


def test_dtype_is_that_of_the_spec(architecture, tokenizer, tmp_path, causal):
    assert load_causal_lm(ModelSpec(architecture=architecture, dtype="bfloat16"), tokenizer).dtype == torch.bfloat16
    path = str(export_folder(causal, tokenizer, tmp_path / "export"))
    assert load_causal_lm(ModelSpec(path=path, dtype="bfloat16"), tokenizer).dtype == torch.bfloat16
    assert load_causal_lm(ModelSpec(path=path), tokenizer).dtype == torch.float32


def test_an_export_loads_with_plain_transformers_and_gives_the_same_logits(causal, tokenizer, tmp_path):
    folder = export_folder(causal, tokenizer, tmp_path / "runs" / "export")
    again = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(again(IDS).logits, causal(IDS).logits, rtol=0, atol=1e-6)
    ours = load_causal_lm(ModelSpec(path=str(folder)), tokenizer)
    torch.testing.assert_close(ours(IDS).logits, causal(IDS).logits, rtol=0, atol=1e-6)
    assert AutoTokenizer.from_pretrained(folder)("a b h").input_ids == [4, 5, 11]
    assert list(folder.glob("*.safetensors"))
    assert not list(folder.glob("*.bin"))


def test_an_export_knows_every_token_that_ends_a_response(causal, tokenizer, tmp_path):
    causal.generation_config = GenerationConfig(eos_token_id=[9, 7], top_k=1)
    assert eos_ids(causal, tokenizer) == [2, 7, 9]
    saved = GenerationConfig.from_pretrained(export_folder(causal, tokenizer, tmp_path / "export"))
    assert saved.eos_token_id == [2, 7, 9]
    assert (saved.pad_token_id, saved.bos_token_id) == (0, 1)
    assert saved.do_sample
    assert saved.top_k == 1  # a recommendation of the source, which nothing here applies


def test_an_export_that_fails_leaves_the_old_folder_and_no_other(causal, tokenizer, tmp_path, monkeypatch):
    folder = export_folder(causal, tokenizer, tmp_path / "export")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    causal.get_input_embeddings().weight.data.zero_()

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full_disk)
    with pytest.raises(UserError, match="no space"):
        export_folder(causal, tokenizer, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_an_export_replaces_the_whole_of_an_older_one(causal, tokenizer, tmp_path):
    folder = export_folder(causal, tokenizer, tmp_path / "export")
    (folder / "stale.bin").touch()
    export_folder(causal, tokenizer, folder)
    assert not (folder / "stale.bin").exists()
    assert list(tmp_path.iterdir()) == [folder]


LLAMA4 = {
    "model_type": "llama4_text",
    "hidden_size": 16,
    "intermediate_size": 16,
    "intermediate_size_mlp": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_local_experts": 2,
    "attention_chunk_size": 4,
}


@pytest.mark.parametrize("adapter", [None, LORA])
def test_llama_4_text_is_trained_and_exported(adapter, tokenizer, tmp_path, batch):
    """Its class names a base model that only the multimodal one has."""
    base = load_causal_lm(ModelSpec(architecture=LLAMA4), tokenizer)
    for parameter in base.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)
    path = str(export_folder(base, tokenizer, tmp_path / "base"))
    policy = PolicyNetwork(load_causal_lm(ModelSpec(path=path, adapter=adapter), tokenizer))
    ids, mask, response = batch
    output = policy(ids, mask, response)
    plain = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    for row, (real, counted) in enumerate(zip(mask, response, strict=True)):
        tokens = ids[row][real]
        expected = plain(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        wanted = counted[1:]
        torch.testing.assert_close(output.logprobs[row][wanted], expected[counted[real][1:]], atol=1e-5, rtol=1e-5)
    output.logprobs.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters())


def test_a_model_type_of_another_kind_is_refused_in_one_line(tokenizer):
    with pytest.raises(UserError, match=r"architecture\.model_type llama4_text: Unrecognized configuration class"):
        load_scalar_model(ModelSpec(architecture=LLAMA4), tokenizer, new_head=True)
