"""What leaves a run with an adapter, held against plain peft and plain transformers; and adapters that do not fit."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.adapters import DEFAULT, adapter_weights
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.frozen import policy_as_it_starts
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.spec import LoRA, ModelSpec
from rlhf_lightning.modules.handoff import shard_if_asked
from rlhf_lightning.modules.strategies import FSDP2Strategy
from rlhf_lightning.modules.tensor_parallel import TensorParallelStrategy
from tests.unit.models.adapted import LORA, change, exported, learnt, logits


@pytest.mark.parametrize(
    "adapter", [LORA, LoRA(rank=2, alpha=4, use_rslora=True, init="gaussian")], ids=["plain", "rslora"]
)
def test_the_export_is_the_policy_and_its_adapter_loads_in_plain_peft(base, tokenizer, batch, tmp_path, adapter):
    policy = PolicyNetwork(learnt(load_causal_lm(ModelSpec(path=base, adapter=adapter), tokenizer)))
    expected = logits(policy.network, batch[0])
    folder = exported(policy, tokenizer, tmp_path / "export")
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["adapter"]

    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert merged.state_dict().keys() == AutoModelForCausalLM.from_pretrained(base).state_dict().keys()
    torch.testing.assert_close(logits(merged, batch[0]), expected, rtol=1e-5, atol=1e-5)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter")
    torch.testing.assert_close(logits(plain, batch[0]), expected, rtol=1e-5, atol=1e-5)
    assert (logits(AutoModelForCausalLM.from_pretrained(base), batch[0]) - expected).abs().max() > 0.1
    again = load_causal_lm(ModelSpec(path=str(folder)), tokenizer)  # as the next stage does
    torch.testing.assert_close(logits(again, batch[0]), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(policy.network, batch[0]), expected, rtol=0, atol=0)  # the run goes on unchanged


def test_the_merged_weights_have_the_precision_of_the_base(base, tokenizer, batch, tmp_path):
    own = ModelSpec(path=base, dtype="bfloat16", adapter=LORA)
    policy = PolicyNetwork(learnt(load_causal_lm(own, tokenizer)))
    folder = exported(policy, tokenizer, tmp_path / "export")
    assert {w.dtype for w in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert merged.dtype == torch.bfloat16
    found, expected = logits(merged, batch[0]).float(), logits(policy.network, batch[0]).float()
    # The adapter is rounded to bfloat16 with the weights, which moves logits by about a rounding of each layer.
    assert (found - expected).norm() <= 2**-4 * expected.norm()
    without = logits(AutoModelForCausalLM.from_pretrained(base), batch[0]).float()
    assert (without - expected).norm() > 2**-2 * expected.norm()


def test_an_adapter_can_be_exported_alone(adapted, base, tokenizer, tmp_path):
    policy = PolicyNetwork(learnt(load_causal_lm(adapted, tokenizer)))
    folder = exported(policy, tokenizer, tmp_path / "export", merge=False)
    assert [p.name for p in folder.iterdir()] == ["adapter"]
    files = {p.name for p in (folder / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "rlhf_lightning.json", "tokenizer.json"} <= files
    trained = adapter_weights(policy.network, DEFAULT)
    written = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert written.keys() == {f"base_model.model.{name}" for name in trained}
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == base


def test_a_reward_models_adapter_brings_its_head(base, tokenizer, batch, reward_adapter, tmp_path):
    folder, model = reward_adapter
    expected = model(*batch[:2])
    raw = model(*batch[:2], normalised=False)
    merged = ScalarModel(load_scalar_model(ModelSpec(path=str(folder.parent)), tokenizer))
    torch.testing.assert_close(merged(*batch[:2]), expected, rtol=1e-5, atol=1e-5)
    again = ScalarModel(load_scalar_model(ModelSpec(path=base, adapter=LoRA(path=str(folder))), tokenizer))
    torch.testing.assert_close(again(*batch[:2]), expected, rtol=1e-5, atol=1e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    plain = PeftModel.from_pretrained(plain, folder)
    ids, mask = batch[0][:1], batch[1][:1]  # one row: plain transformers looks for the end by the pad id
    torch.testing.assert_close(logits(plain, ids[:, : int(mask.sum())])[0, 0], raw[0], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- bad input


@pytest.fixture
def adapter_folder(adapted, tokenizer, tmp_path):
    return exported(PolicyNetwork(learnt(load_causal_lm(adapted, tokenizer))), tokenizer, tmp_path / "run") / "adapter"


def test_an_adapter_for_other_weights_is_refused(base, tokenizer, adapter_folder):
    change(base)
    with pytest.raises(UserError, match=r"for another base than .*whose weights"):
        load_causal_lm(ModelSpec(path=base, adapter=LoRA(path=str(adapter_folder))), tokenizer)


def test_an_adapter_for_other_shapes_is_refused(architecture, tokenizer, adapter_folder, tmp_path):
    key = "hidden_size" if architecture["model_type"] == "llama" else "n_embd"
    small = load_causal_lm(ModelSpec(architecture=architecture | {key: 8}), tokenizer)
    path = str(export_folder(small, tokenizer, tmp_path / "small"))
    (adapter_folder / "rlhf_lightning.json").unlink()  # as others write theirs
    with pytest.raises(UserError, match=r"another base than .* is \(3, 16\) there and \(3, 8\) here"):
        load_causal_lm(ModelSpec(path=path, adapter=LoRA(path=str(adapter_folder))), tokenizer)


def test_an_adapter_that_lacks_a_weight_is_refused(base, tokenizer, adapter_folder):
    file = adapter_folder / "adapter_model.safetensors"
    weights = load_file(file)
    del weights[max(weights)]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match="missing there"):
        load_causal_lm(ModelSpec(path=base, adapter=LoRA(path=str(adapter_folder))), tokenizer)


def test_the_adapter_of_a_reward_model_is_no_policy(base, tokenizer, reward_adapter):
    with pytest.raises(UserError, match="adapter of a reward model"):
        load_causal_lm(ModelSpec(path=base, adapter=LoRA(path=str(reward_adapter[0]))), tokenizer)


def test_an_adapter_is_no_model(tokenizer, adapter_folder):
    with pytest.raises(UserError, match="give its base as `path`"):
        load_causal_lm(ModelSpec(path=str(adapter_folder)), tokenizer)


def test_a_folder_without_an_adapter_is_refused(base, tokenizer, tmp_path):
    with pytest.raises(UserError, match="no adapter folder"):
        load_causal_lm(ModelSpec(path=base, adapter=LoRA(path=str(tmp_path))), tokenizer)


@pytest.mark.parametrize("target", ["lm_head", "embeddings", "nonsense"])
def test_targets_that_can_not_be_adapted_are_refused(base, tokenizer, architecture, target):
    name = {"embeddings": {"llama": "embed_tokens", "gpt2": "wte"}[architecture["model_type"]]}.get(target, target)
    with pytest.raises(UserError, match=name):
        load_causal_lm(ModelSpec(path=base, adapter=LoRA(target_modules=[name])), tokenizer)


def test_tokens_that_the_base_does_not_know_are_refused(base, tokenizer):
    tokenizer.add_tokens(["new"])
    with pytest.raises(UserError, match=r"tokenizer has 13 tokens .* embeddings for 12"):
        load_causal_lm(ModelSpec(path=base, adapter=LORA), tokenizer)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "x", "rank": 4}, "give `path` alone"),
        ({"rank": 0}, "needs a rank"),
        ({"target_modules": []}, "target_modules"),
    ],
)
def test_settings_of_an_adapter_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        LoRA(**fields)


def test_a_network_from_scratch_takes_no_adapter(architecture):
    with pytest.raises(UserError, match="trained base"):
        ModelSpec(architecture=architecture, adapter=LORA)


def test_without_peft_the_extra_is_named(adapted, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'rlhf_lightning\[lora\]'"):
        load_causal_lm(adapted, tokenizer)


def test_quantized_weights_are_never_trained():
    with pytest.raises(UserError, match="below an `adapter`"):
        ModelSpec(path="x", quantization="4bit")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_quantization_without_a_gpu_is_refused(base, tokenizer):
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        load_causal_lm(ModelSpec(path=base, adapter=LORA, quantization="4bit"), tokenizer)


def test_without_bitsandbytes_the_extra_is_named(base, tokenizer, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'rlhf_lightning\[qlora\]'"):
        load_causal_lm(ModelSpec(path=base, adapter=LORA, quantization="4bit"), tokenizer)


def test_quantized_weights_are_not_sharded():
    packed = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)])
    module = SimpleNamespace(_trainer=SimpleNamespace(strategy=FSDP2Strategy()))
    with pytest.raises(UserError, match="quantized weights can't be sharded"):
        shard_if_asked(module, packed)


def test_an_adapter_is_not_split_over_ranks(adapted, tokenizer):
    strategy = TensorParallelStrategy()
    module = SimpleNamespace(_trainer=SimpleNamespace(strategy=strategy), automatic_optimization=True, device_mesh={})
    with pytest.raises(UserError, match="no tensor parallelism"):
        shard_if_asked(module, PolicyNetwork(load_causal_lm(adapted, tokenizer)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantized_base_trains_an_adapter_and_merges(base, tokenizer, batch, tmp_path, quantization):
    pytest.importorskip("bitsandbytes")
    own = ModelSpec(path=base, dtype="bfloat16", adapter=LORA, quantization=quantization)
    policy = PolicyNetwork(load_causal_lm(own, tokenizer)).cuda()
    reference = policy_as_it_starts(policy, own, tokenizer, policy)
    batch = tuple(x.cuda() for x in batch)
    start = reference(*batch).logprobs
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        loss = -policy(*batch).logprobs.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert -policy(*batch).logprobs.sum() < -start.sum()
    assert torch.equal(reference(*batch).logprobs, start)
    folder = exported(policy, tokenizer, tmp_path / "export")
    merged = PolicyNetwork(load_causal_lm(ModelSpec(path=str(folder), dtype="bfloat16"), tokenizer)).cuda()
    torch.testing.assert_close(merged(*batch).logprobs, policy(*batch).logprobs, rtol=0.05, atol=0.1)
