"""Rows of plain text: no chat template is added for them, and every export records the format of its rows."""

import json
import logging

import pytest
from transformers import pipeline as transformers_pipeline

from rlhf_lightning.cli import main
from rlhf_lightning.commands.speaker import Speaker
from rlhf_lightning.data.chat import DEFAULT_CHAT_TEMPLATE
from rlhf_lightning.data.prompt_format import match_format, trained_format
from rlhf_lightning.data.tokenizers import load_tokenizer
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.reward import Samples
from rlhf_lightning.rewards.reward_model import RewardModelReward
from rlhf_lightning.worlds import world_tokenizer

FIELDS = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
FIELDS |= {"intermediate_size": 16, "max_position_embeddings": 128, "tie_word_embeddings": True}
QUIET = ["--trainer.accelerator", "cpu", "--wandb", "disabled", "--trainer.enable_progress_bar", "false"]
QUIET += ["--samples.every_n_steps", "0", "--data.split.validation", "0"]
HEADERS = "'User:' and 'Assistant:' headers"


def as_messages(row):
    talk = {"prompt": [{"role": "user", "content": row["prompt"]}]}
    return talk | {name: [{"role": "assistant", "content": row[name]}] for name in row if name != "prompt"}


PAIRS = [
    {"prompt": f"who owns the {thing} ?", "chosen": f"anna owns the {thing}", "rejected": "no"}
    for thing in ("kite", "ball", "hammer", "egg")
]
ROWS = {
    "pairs": PAIRS,
    "demos": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS],
    "texts": [{"text": f"{row['prompt']} {row['chosen']}"} for row in PAIRS],
    "prompts": [{"prompt": row["prompt"]} for row in PAIRS],
}
ROWS |= {f"talks_{name}": [as_messages(row) for row in ROWS[name]] for name in ("pairs", "demos", "prompts")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose tokenizer has no chat template, and rows."""
    folder = tmp_path_factory.mktemp("own")
    tokenizer = world_tokenizer()
    tokenizer.chat_template = None
    export_folder(load_causal_lm(ModelSpec(architecture=FIELDS), tokenizer), tokenizer, folder / "model")
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def fit(folder, recipe, rows, out, model, *more):
    batch = "2" if recipe in ("ppo", "grpo") else "4"
    args = ["fit", "-c", f"configs/recipes/own_{recipe}.yaml", "--data.source", str(folder / f"{rows}.jsonl")]
    args += ["--trainer.default_root_dir", str(folder / out), "--data.batch_size", batch, *QUIET]
    start = "--model.network.path" if recipe == "reward" else "--model.policy.path"
    main([*args, start, str(folder / model), *more])
    return folder / out / "export"


@pytest.fixture(scope="module")
def sft(folder):
    with pytest.MonkeyPatch.context():
        return fit(folder, "sft", "demos", "sft", "model", "--trainer.max_steps", "1")


def template_of(export):
    return load_tokenizer(str(export)).chat_template


@pytest.mark.parametrize("rows", ["demos", "texts"])
def test_sft_on_plain_rows_adds_no_chat_template_and_says_nothing_of_one(folder, caplog, rows):
    with caplog.at_level(logging.INFO):
        export = fit(folder, "sft", rows, f"sft_{rows}", "model", "--trainer.max_steps", "1")
    assert HEADERS not in caplog.text
    assert template_of(export) is None
    assert trained_format(load_tokenizer(str(export))) == "text"
    assert Speaker(str(export), SamplingParameters(8), None).format == "text"
    again = folder / f"again_{rows}"
    main(["export", "--run", str(folder / f"sft_{rows}"), "--output", str(again)])  # knows it from the checkpoint
    assert (template_of(again), trained_format(load_tokenizer(str(again)))) == (None, "text")
    generate = transformers_pipeline("text-generation", model=str(export), device="cpu")  # plain transformers
    assert generate("who owns", max_new_tokens=4)[0]["generated_text"].startswith("who owns")


def test_sft_on_conversations_adds_one_and_records_them(folder, caplog):
    export = fit(folder, "sft", "talks_demos", "sft_talks", "model", "--trainer.max_steps", "1")
    assert caplog.text.count(HEADERS) == 1
    assert template_of(export) == DEFAULT_CHAT_TEMPLATE
    assert Speaker(str(export), SamplingParameters(8), None).format == "messages"
    again = folder / "again_talks"
    main(["export", "--run", str(folder / "sft_talks"), "--output", str(again)])
    assert (template_of(again), trained_format(load_tokenizer(str(again)))) == (DEFAULT_CHAT_TEMPLATE, "messages")


@pytest.mark.parametrize("recipe", ["dpo", "reward"])
@pytest.mark.parametrize(("rows", "found"), [("pairs", "text"), ("talks_pairs", "messages")])
def test_the_rows_of_the_run_decide_and_a_change_is_a_warning(folder, sft, caplog, recipe, rows, found):
    export = fit(folder, recipe, rows, f"{recipe}_{rows}", "sft/export", "--trainer.max_steps", "1")
    assert trained_format(load_tokenizer(str(export))) == found
    warning = "the rows are conversations, and the model that the run starts from was trained on plain text"
    assert (warning in caplog.text) == (found == "messages")
    assert (template_of(export) is None) == (found == "text")


def test_ppo_with_a_reward_model_of_another_format_warns_once(folder, sft, caplog):
    reward = fit(folder, "reward", "pairs", "reward_for_ppo", "sft/export", "--trainer.max_steps", "1")
    given = ["--model.reward", "RewardModelReward", "--model.reward.path", str(reward), "--model.iterations", "1"]
    given += ["--model.critic.path", str(reward)]
    given += ["--model.sampling.max_new_tokens", "4"]
    export = fit(folder, "ppo", "prompts", "ppo", "sft/export", *given)
    assert trained_format(load_tokenizer(str(export))) == "text"
    assert "was trained on" not in caplog.text
    scored = RewardModelReward(str(reward))
    scored.prepare("cpu")
    prompts = [[{"role": "user", "content": "who owns the kite ?"}]] * 2
    for _ in range(2):
        scored.score(Samples(prompts, ["anna", "no"], [[], []], [False, False], {}))
    assert caplog.text.count("the prompts are conversations") == 1
    assert caplog.text.count("was trained on plain text; give it prompts of that format") == 1


def test_sample_warns_where_the_prompts_are_of_another_format(sft, caplog):
    tokenizer = load_tokenizer(str(sft))
    match_format(tokenizer, ["a", "b"])
    assert caplog.text == ""
    match_format(tokenizer, [[{"role": "user", "content": "a"}]])
    assert f"{sft} was trained on plain text" in caplog.text
    assert tokenizer.chat_template == DEFAULT_CHAT_TEMPLATE
