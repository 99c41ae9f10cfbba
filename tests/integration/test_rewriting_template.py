"""Runs of every stage on a model whose chat template rewrites earlier turns, on rows of several turns."""

import csv
import io
import json
import sys

import pytest

from rlhf_lightning.cli import main
from rlhf_lightning.commands.speaker import Speaker
from rlhf_lightning.generation.engine import SamplingParameters
from tests import tiny_qwen3
from tests.chat_templates import CONVERSATIONS, TOOL, bot, user

QUIET = ["--trainer.accelerator", "cpu", "--wandb", "disabled", "--trainer.enable_progress_bar", "false"]
QUIET += ["--trainer.log_every_n_steps", "1", "--data.split.validation", "0.2", "--trainer.max_epochs", "2"]
QUIET += ["--samples.every_n_steps", "0"]
TURNS = [*CONVERSATIONS["tools"][:4], user("And 3?"), bot("3", reasoning_content="It is a number.")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    tiny_qwen3.make(folder / "model")
    talks = [[user(f"{n}?"), bot(f"{n}.", reasoning_content="hm"), user("Sure?"), bot("Yes.")] for n in range(12)]
    rows = [{"messages": talk, "tools": None} for talk in talks] + [{"messages": TURNS, "tools": [TOOL]}] * 4
    pairs = [
        {"prompt": talk[:-1], "chosen": talk[-1:], "rejected": [bot("No.", reasoning_content="oh")]} for talk in talks
    ]
    pairs += [{"prompt": TURNS[:1], "chosen": TURNS[1:4], "rejected": [bot("3")], "tools": [TOOL]}] * 4
    prompts = [{"prompt": talk[:-1]} for talk in talks]
    for name, lines in {"sft": rows, "pairs": pairs, "prompts": prompts}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


def fit(folder, recipe, out, *more):
    data = {"dpo": "pairs", "grpo": "prompts"}.get(recipe, "sft")
    args = ["fit", "-c", f"configs/recipes/own_{recipe}.yaml", "--data.source", str(folder / f"{data}.jsonl")]
    main([*args, "--model.policy.path", str(folder / "model"), *QUIET, "--trainer.default_root_dir", str(out), *more])
    with (out / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


@pytest.mark.parametrize("mask", ["completion", "assistant"])
def test_sft(folder, tmp_path, mask):
    lines = fit(folder, "sft", tmp_path / "a", "--data.mask", mask, "--data.batch_size", "4")
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < losses[0] < 7  # log of 265 is 5.6


def test_dpo(folder, tmp_path):
    lines = fit(folder, "dpo", tmp_path / "a", "--data.batch_size", "4", "--model.optimizer.lr", "0.001")
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[0] == pytest.approx(0.693147, abs=1e-6)
    assert losses[-1] < losses[0]


def test_variables_of_training_are_those_of_chat(folder, tmp_path, monkeypatch):
    setting = ["--data.chat_template_kwargs", '{"enable_thinking": false}', "--trainer.max_steps", "2"]
    fit(folder, "sft", tmp_path / "a", "--data.mask", "assistant", *setting)
    speaker = Speaker(str(tmp_path / "a" / "export"), SamplingParameters(max_new_tokens=8), "Be brief.")
    asked = []
    generate = speaker.network.generate
    monkeypatch.setattr(speaker.network, "generate", lambda **given: asked.append(given["inputs"]) or generate(**given))
    for said in ("Hi", "One", "Two"):
        list(speaker.answer(said))
    tokenizer = speaker.tokenizer
    texts = [tokenizer.decode(ids[0]) for ids in asked]
    assert all(text.endswith("assistant\n<think>\n\n</think>\n\n") for text in texts)
    assert texts[2].count("<|im_start|>") == 7
    history = speaker.messages[:-1]
    assert texts[2] == tokenizer.apply_chat_template(
        history, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    other = Speaker(str(tmp_path / "a" / "export"), SamplingParameters(8), None, {"enable_thinking": True})
    assert other.tokenizer.init_kwargs["chat_template_kwargs"] == {"enable_thinking": True}


def test_chat_goes_on_past_the_second_message(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nAgain\nAnd again\n\n"))
    variables = ["--chat_template_kwargs", '{"enable_thinking": false}']
    main(["chat", "--model", str(folder / "model"), "--max_new_tokens", "4", "--seed", "0", *variables])
    assert "error" not in capsys.readouterr().err
