"""The whole road in miniature: every stage learns, hands over, is skipped the second time, and can be used elsewhere."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import pipeline as hf_pipeline

from rlhf_lightning.data.encoding import encode_pair
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.policy import PolicyNetwork
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.models.spec import ModelSpec

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def run(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "rlhf_lightning", *args]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "160"}
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The quickstart's pipeline, shrunken, and what it printed."""
    folder = tmp_path_factory.mktemp("pipeline")
    plan = yaml.safe_load((ROOT / "configs/quickstart/pipeline.yaml").read_text())
    steps = {"sft": 300, "reward": 150, "dpo": 100, "ppo": 80}
    for stage in plan["stages"]:
        stage["options"] = {"trainer.max_steps": steps[stage["name"]], "trainer.limit_val_batches": 4}
    plan["output"] = str(folder / "run")
    settings = {"prompts": 150, "samples": 2, "best_of_prompts": 20, "best_of_samples": 4}
    plan["evaluation"] = {"class_path": "WorldEvaluation", "init_args": settings}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(plan))
    done = run("pipeline", "--config", str(folder / "pipeline.yaml"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done.stdout


def test_every_stage_leaves_its_run_and_a_report_is_written(small):
    folder, printed = small
    for stage in ("sft", "reward", "dpo", "ppo"):
        for name in (
            "config.yaml",
            "metrics.csv",
            "export/config.json",
            "export/model.safetensors",
            "checkpoints/last.ckpt",
        ):
            assert (folder / "run" / stage / name).is_file(), f"{stage}/{name}"
    assert "report:" in printed
    page = (folder / "run" / "report" / "index.html").read_text()
    assert page.count("<svg") >= 9
    report = json.loads((folder / "run" / "report.json").read_text())
    assert report["title"] == "From a clone to an aligned model"  # of the pipeline's file
    assert report["headline"].startswith(("ppo raised the gold reward", "dpo raised the gold reward"))
    assert report["headline"].split(" (")[0] in " ".join(printed.split())
    for stage in report["stages"]:
        assert stage["command"].startswith("python -m rlhf_lightning fit --config configs/quickstart/")
        assert f"default_root_dir: {folder / 'run' / stage['name']}" in page  # of its config.yaml
    assert len(report["thresholds"]) >= 10
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)|url\((?!#)|@import""", page)  # nothing is fetched


def test_the_methods_learn(small):
    report = json.loads((small[0] / "run" / "report.json").read_text())
    held_out = {name: parts["held_out/sampled"] for name, parts in report["policies"].items()}
    assert report["reward_model"]["held_out"]["accuracy"] > 0.6
    for method in ("dpo", "ppo"):
        assert report["comparisons"][method]["held_out/sampled"]["gain"]["low"] > 0, method
        assert held_out[method]["kl"] > 0.1
    assert held_out["sft"]["kl"] == pytest.approx(0, abs=1e-6)


def test_a_second_run_skips_what_is_finished(small):
    folder, _ = small
    before = (folder / "run/sft/export/model.safetensors").stat().st_mtime_ns
    done = run("pipeline", "--config", str(folder / "pipeline.yaml"))
    assert done.returncode == 0
    assert done.stdout.count("finished before") == 4
    assert (folder / "run/sft/export/model.safetensors").stat().st_mtime_ns == before


def test_other_settings_in_the_same_folder_are_refused(small):
    folder, _ = small
    done = run("pipeline", "--config", str(folder / "pipeline.yaml"), "--seed_everything", "5")
    assert done.returncode == 2
    assert "other settings" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_required_threshold_that_is_missed_is_an_error_after_the_report(small):
    folder, _ = small
    plan = yaml.safe_load((folder / "pipeline.yaml").read_text())
    wins = {"figure": "comparisons:ppo:held_out/sampled:win_rate:mean", "low": 1.01, "name": "wins more than always"}
    plan["report"] = {"title": "Of my own", "thresholds": [wins], "require_thresholds": True}
    plan["evaluation"]["init_args"] |= {"prompts": 4, "best_of_samples": 0}
    (folder / "strict.yaml").write_text(yaml.safe_dump(plan))
    files = [folder / "run" / name for name in ("report.json", "report/index.html")]
    before = [file.read_bytes() for file in files]
    done = run("pipeline", "--config", str(folder / "strict.yaml"))
    page = files[1].read_text()
    for file, content in zip(files, before, strict=True):  # other tests read them
        file.write_bytes(content)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: seed 0: thresholds missed: wins more than always; the report is complete"
    )
    assert "<h1>Of my own</h1>" in page
    assert "1 of 1 thresholds missed" in page


def test_the_exported_policy_is_plain_transformers(small):
    folder = small[0] / "run/ppo/export"
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ours = PolicyNetwork(load_causal_lm(ModelSpec(path=str(folder)), tokenizer))
    messages = [{"role": "user", "content": "how do i cut the bread ?"}]
    encoded = encode_pair(tokenizer, messages, [{"role": "assistant", "content": "you can cut it with the knife ."}])
    ids = torch.tensor([encoded.prompt_ids + encoded.response_ids])
    everything = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        expected = plain(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        torch.testing.assert_close(ours(ids, everything, everything).logprobs, expected, rtol=0, atol=1e-6)
    answer = hf_pipeline("text-generation", model=str(folder), tokenizer=str(folder))(messages, max_new_tokens=24)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"
    assert answer[0]["generated_text"][-1]["content"].strip()


def test_the_exported_reward_model_is_plain_transformers(small):
    folder = small[0] / "run/reward/export"
    plain, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ours = ScalarModel(load_scalar_model(ModelSpec(path=str(folder)), tokenizer))
    ids = tokenizer("<bos> <user> who owns the kite ? <assistant> i do not know . <eos>", return_tensors="pt").input_ids
    with torch.no_grad():
        scores = ours(ids, torch.ones_like(ids, dtype=torch.bool), normalised=False)
        torch.testing.assert_close(scores, plain(ids).logits[:, 0], rtol=0, atol=1e-6)
    assert plain.config.reward_gain == pytest.approx(float(ours.gain))
    assert plain.config.reward_gain != 1


def test_export_makes_the_same_folder_from_the_checkpoint(small):
    folder = small[0] / "run"
    done = run("export", "--run", str(folder / "reward"), "--output", str(folder / "again"))
    assert done.returncode == 0, done.stderr[-2000:]
    first, again = (folder / p / "model.safetensors" for p in ("reward/export", "again"))
    assert first.read_bytes() == again.read_bytes()
    assert json.loads((folder / "again/config.json").read_text())["reward_gain"] != 1


def test_chat_answers_from_two_folders_side_by_side(small):
    folder = small[0] / "run"
    command = [sys.executable, "-m", "rlhf_lightning", "chat", "--model", str(folder / "sft/export")]
    command += ["--against", str(folder / "ppo/export"), "--max_new_tokens", "24", "--seed", "0"]
    done = subprocess.run(command, input="who owns the kite ?\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "sft/export" in done.stdout
    assert "ppo/export" in done.stdout
    assert len(done.stdout.split()) > 20


def test_validate_reads_an_exported_stage(small):
    config, folder = str(ROOT / "configs/quickstart/dpo.yaml"), small[0] / "run"
    args = ["validate", "--config", config, "--model.init_args.policy.path", str(folder / "sft/export")]
    done = run(*args, "--trainer.limit_val_batches", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "eval/rewards/accuracies" in done.stdout


def test_metrics_have_the_names_that_trl_users_know(small):
    names = {
        "sft": "loss entropy mean_token_accuracy num_tokens learning_rate grad_norm epoch",
        "reward": "loss accuracy margin min_reward mean_reward max_reward num_tokens",
        "dpo": "rewards/chosen rewards/rejected rewards/accuracies rewards/margins logps/chosen logps/rejected "
        "logits/chosen logits/rejected entropy mean_token_accuracy",
        "ppo": "eps objective/kl objective/entropy objective/non_score_reward objective/rlhf_reward objective/scores "
        "policy/approxkl_avg policy/clipfrac_avg policy/entropy_avg loss/policy_avg loss/value_avg val/clipfrac_avg "
        "val/ratio val/ratio_var val/num_eos_tokens learning_rate episode val/explained_variance kl_coef",
    }
    for stage, expected in names.items():
        with (small[0] / "run" / stage / "metrics.csv").open() as file:
            columns = set(csv.DictReader(file).fieldnames)
        assert {f"train/{name}" for name in expected.split()} <= columns, stage


def test_the_offline_wandb_run_holds_metrics_and_the_sample_table(small):
    run_folder = next((small[0] / "run/ppo/wandb").glob("offline-run-*"))
    written = next(run_folder.glob("run-*.wandb")).read_bytes()
    for name in ("train/objective/kl", "train/objective/scores", "train/kl_coef", "eval/greedy/score", "completions"):
        assert name.encode() in written, name
    tables = [json.loads(path.read_text()) for path in run_folder.glob("files/media/table/completions_*.table.json")]
    longest = max(tables, key=lambda table: len(table["data"]))
    assert longest["columns"] == ["step", "query", "model response", "score"]
    assert len(longest["data"]) >= 4
