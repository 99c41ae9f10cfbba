"""The generation config of a folder: kept by exports, and never applied by chat or evaluation."""

import io
import json

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, GenerationConfig

from rlhf_lightning.cli import main, run_command
from rlhf_lightning.commands import chat
from rlhf_lightning.commands.speaker import Speaker
from rlhf_lightning.data.encoding import encode_prompt
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.answers import Answerer
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.models.export import export_folder, generation_config
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.worlds import world_tokenizer

FIELDS = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
FIELDS |= {"intermediate_size": 32, "max_position_embeddings": 128, "tie_word_embeddings": True}
RECOMMENDED = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": 20,
    "min_p": 0.05,
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
}
QUESTION = [{"role": "user", "content": "who owns the kite ?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bfloat16 model far from uniform, as from a hub, with recommendations that change even a greedy answer."""
    torch.manual_seed(0)
    tokenizer = world_tokenizer()
    network = load_causal_lm(ModelSpec(architecture=FIELDS), tokenizer)
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3, generator=generator)
    path = tmp_path_factory.mktemp("hub") / "model"
    network.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **RECOMMENDED
    ).save_pretrained(path)
    return path


def greedy_by_hand(network, ids, steps, ends):
    ids = list(ids)
    start = len(ids)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(network(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[start:]


def answer(folder, sampling, said=QUESTION[0]["content"]):
    speaker = Speaker(str(folder), sampling, None)
    return speaker, "".join(speaker.answer(said))


def test_temperature_0_in_chat_and_evaluation_is_the_most_likely_token_whatever_the_folder_recommends(folder):
    sampling = SamplingParameters(max_new_tokens=24, temperature=0)
    speaker, text = answer(folder, sampling)
    tokenizer, network = speaker.tokenizer, load_causal_lm(ModelSpec(path=str(folder)), speaker.tokenizer).eval()
    ids = greedy_by_hand(network, encode_prompt(tokenizer, QUESTION), 24, [tokenizer.eos_token_id])
    assert len(set(ids)) < len(ids)  # the recommended penalty would have changed this
    assert text.strip() == tokenizer.decode(ids, skip_special_tokens=True).strip()
    evaluated = Answerer(folder, folder).answer([QUESTION], sampling, samples=1, seed=0)
    assert evaluated.texts[0][0].strip() == text.strip()


def test_options_that_are_set_in_chat_are_applied(folder):
    greedy = SamplingParameters(max_new_tokens=24, temperature=0)
    _, plain = answer(folder, greedy)
    _, penalized = answer(folder, SamplingParameters(max_new_tokens=24, temperature=0, repetition_penalty=1.8))
    assert plain != penalized
    stop = plain.split()[2]
    _, stopped = answer(folder, SamplingParameters(max_new_tokens=24, temperature=0, stop_strings=stop))
    assert stopped.split() == plain.split()[: plain.split().index(stop) + 1]


def test_chat_says_what_the_folder_recommends_and_does_not_apply_it(folder, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(chat, "Console", lambda: Console(file=shown, width=400))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    run_command("chat", ["--model", str(folder), "--temperature", "0", "--stop_strings", '["\\n"]', "--top_k", "5"])
    assert "recommends temperature 0.6, top_p 0.95, top_k 20, min_p 0.05, repetition_penalty 1.3" in shown.getvalue()
    assert "not applied" in shown.getvalue()


@pytest.mark.parametrize(
    ("typed", "strings"), [("User:", ["User:"]), ('["\\n", "a"]', ["\n", "a"]), ("a, b", ["a, b"])]
)
def test_stop_strings_are_typed_as_text_or_as_a_list(monkeypatch, typed, strings):
    seen = {}
    monkeypatch.setitem(main.__globals__["COMMANDS"], "chat", _recorded(seen))
    run_command("chat", ["--model", "x", "--stop_strings", typed])
    assert list(SamplingParameters(stop_strings=seen["stop_strings"]).stop_strings) == strings


def _recorded(seen):
    def chat_(model: str, stop_strings: list[str] | str = []) -> None:  # noqa: B006
        seen["stop_strings"] = stop_strings

    return chat_


def test_an_answer_in_chat_is_as_long_as_the_context_leaves(folder):
    long = "who owns the kite ? " * 22
    speaker, _ = answer(folder, SamplingParameters(max_new_tokens=4, temperature=0), long)
    used = len(encode_prompt(speaker.tokenizer, [{"role": "user", "content": long.strip()}]))
    assert 100 < used < 128
    speaker.forget()
    speaker.sampling = SamplingParameters(max_new_tokens=500, min_new_tokens=500, temperature=0)
    text = "".join(speaker.answer(long.strip()))
    assert len(speaker.tokenizer(text, add_special_tokens=False)["input_ids"]) <= 128 - used
    with pytest.raises(UserError, match="reads 128 tokens, the conversation has"):
        speaker.answer(long)


# ---------------------------------------------------------------- exports


def exported(folder, output, *args):
    policy = ["--model", "SFTModule", "--model.policy.path", str(folder), "--data", "DemonstrationDataModule"]
    data = ["--data.source", "HHHWorld", "--data.source.demonstrations", "8", "--data.source.held_out", "4"]
    quick = ["--trainer.accelerator", "cpu", "--trainer.max_steps", "1", "--wandb", "disabled"]
    quick += ["--samples.every_n_steps", "0", "--trainer.enable_progress_bar", "false"]
    main(["fit", *policy, *data, *quick, "--trainer.default_root_dir", str(output), *args])
    return output / "export"


def test_an_export_keeps_the_recommendations_and_the_precision_of_its_source(folder, tmp_path):
    path = exported(folder, tmp_path / "run")
    kept = json.loads((path / "generation_config.json").read_text())
    assert {name: kept[name] for name in RECOMMENDED} == RECOMMENDED
    assert kept["eos_token_id"] == [world_tokenizer().eos_token_id]
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
    network, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert network.dtype == torch.bfloat16
    before = AutoModelForCausalLM.from_pretrained(folder)
    size = (path / "model.safetensors").stat().st_size
    assert abs(size - (folder / "model.safetensors").stat().st_size) < 4096  # a tied head is stored once
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7]])
        assert not torch.equal(network(ids).logits, before(ids).logits)  # one step of training is in it
    # A second stage starts from the export, and hands the same recommendations on.
    again = exported(path, tmp_path / "second", "--export.dtype", "trained")
    assert json.loads((again / "generation_config.json").read_text()) == kept
    assert json.loads((again / "config.json").read_text())["dtype"] == "float32"


def test_the_export_command_can_keep_the_precision_of_training(folder, tmp_path):
    exported(folder, tmp_path / "run")
    output = tmp_path / "as_trained"
    main(["export", "--run", str(tmp_path / "run"), "--output", str(output), "--dtype", "trained"])
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.float32


def test_a_reward_model_keeps_the_precision_of_its_source_too(folder, tmp_path):
    tokenizer = world_tokenizer()
    network = load_scalar_model(ModelSpec(path=str(folder)), tokenizer, new_head=True)
    assert network.dtype == torch.float32
    path = export_folder(network, tokenizer, tmp_path / "reward")
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
    again = load_scalar_model(ModelSpec(path=str(path)), tokenizer)
    torch.testing.assert_close(again.score.weight, network.score.weight, rtol=2**-8, atol=0)
    assert network.dtype == torch.float32  # the network itself is left alone


def test_a_network_from_scratch_is_exported_as_it_is(tmp_path):
    tokenizer = world_tokenizer()
    network = load_causal_lm(ModelSpec(architecture=FIELDS), tokenizer)
    path = export_folder(network, tokenizer, tmp_path / "scratch")
    assert json.loads((path / "config.json").read_text())["dtype"] == "float32"
    assert torch.equal(AutoModelForCausalLM.from_pretrained(path).lm_head.weight, network.lm_head.weight)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({}, {"do_sample": True}),
        ({"do_sample": False}, {"do_sample": False}),
        ({"do_sample": False, "temperature": 0.9}, {"do_sample": True, "temperature": 0.9}),
        ({"do_sample": False, "repetition_penalty": 1.1}, {"do_sample": False, "repetition_penalty": 1.1}),
        ({"num_beams": 4, "length_penalty": 0.8}, {"num_beams": 4, "length_penalty": 0.8}),
        ({"length_penalty": 0.8, "temperature": 0.5}, {"length_penalty": None, "temperature": 0.5}),
        ({"max_new_tokens": 99, "suppress_tokens": [7]}, {"max_new_tokens": 99, "suppress_tokens": [7]}),
    ],
    ids=str,
)
def test_whatever_a_source_recommends_can_be_saved(tmp_path, source, expected):
    tokenizer = world_tokenizer()
    network = load_causal_lm(ModelSpec(architecture=FIELDS), tokenizer)
    network.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, 9], **source)
    kept = generation_config(network, tokenizer)
    kept.save_pretrained(tmp_path)
    read = GenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(read, name) for name in expected} == expected
    assert read.eos_token_id == sorted([tokenizer.eos_token_id, 9])
