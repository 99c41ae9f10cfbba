"""What a user can get wrong: one line that says what and what to do, exit code 2, no traceback, nothing left behind."""

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy

from rlhf_lightning.cli import main
from rlhf_lightning.data.demonstrations import DemonstrationDataModule
from rlhf_lightning.data.splits import Split
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.export import export_folder
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.modules import PPOModule, SFTModule
from rlhf_lightning.modules.handoff import shard_if_asked
from rlhf_lightning.rewards.world import GoldReward
from rlhf_lightning.worlds import HHHWorld, world_tokenizer

ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
SFT = ["fit", "--model", "SFTModule", "--model.policy.architecture", json.dumps(ARCHITECTURE)]
WORLD = ["--data", "DemonstrationDataModule", "--data.source", "HHHWorld", "--data.source.demonstrations", "16"]
QUICK = [
    "--trainer.accelerator",
    "cpu",
    "--trainer.max_steps",
    "1",
    "--wandb",
    "disabled",
    "--samples.every_n_steps",
    "0",
]
QUICK += ["--trainer.enable_progress_bar", "false", "--data.source.held_out", "4"]


def refused(capsys, *args: str) -> str:
    """Run a command that must be refused; what it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(list(args))
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    before, mark, error = said.partition("error: ")
    assert mark
    assert "error: " not in error
    assert len(error.strip().splitlines()) <= 11  # what is wrong, and of bad rows the first ten
    assert not before or before.endswith("\n")
    return mark + error.strip()


def policy_folder(folder):
    """A policy that nobody trained."""
    tokenizer = world_tokenizer()
    if not (folder / "policy").exists():
        export_folder(load_causal_lm(ModelSpec(architecture=ARCHITECTURE), tokenizer), tokenizer, folder / "policy")
    return folder / "policy"


def from_file(path, run, *more: str) -> list[str]:
    """SFT from a file, with a policy whose tokenizer serves."""
    policy = policy_folder(run.parent)
    args = ["fit", "--model", "SFTModule", "--model.policy.path", str(policy)]
    args += ["--data", "DemonstrationDataModule", "--data.source", str(path), "--data.split.validation=0"]
    return [*args, *QUICK[:-2], "--trainer.default_root_dir", str(run), *more]


def test_a_missing_file_is_named(tmp_path, capsys):
    said = refused(capsys, *from_file(tmp_path / "none.jsonl", tmp_path / "run"))
    assert "none.jsonl" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "compl', ("rows.jsonl", "2")),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}\n', ("completion", "2")),
        ('{"question": "a"}\n', ("question",)),
        ("", ("rows.jsonl", "empty")),
        ('{"prompt": "a", "completion": "b"}\n{"chosen": "a", "rejected": "b"}\n', ("row 1", "chosen")),
    ],
    ids=["malformed", "empty field", "unknown columns", "empty file", "mixed formats"],
)
def test_bad_rows_are_named(tmp_path, capsys, rows, words):
    path = tmp_path / "rows.jsonl"
    path.write_text(rows)
    said = refused(capsys, *from_file(path, tmp_path / "run"))
    for word in words:
        assert word in said
    assert not (tmp_path / "run").exists()


def test_no_supervised_token_left_is_an_error(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "who owns the kite ? " * 8, "completion": "anna"}) + "\n")
    said = refused(capsys, *from_file(path, tmp_path / "run", "--data.max_length", "8"))
    assert "without a token to learn" in said


def test_rows_longer_than_the_model_reads_are_refused_before_training(tmp_path, capsys):
    short = [*SFT[:-1], json.dumps({**ARCHITECTURE, "max_position_embeddings": 16})]
    said = refused(capsys, *short, *WORLD, *QUICK, "--trainer.default_root_dir", str(tmp_path / "run"))
    assert "the model reads 16" in said
    assert "data.max_length" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asking_for_a_gpu_that_is_not_there_is_one_line(tmp_path, capsys):
    gpu = ["--trainer.accelerator", "gpu", "--trainer.default_root_dir", str(tmp_path / "run")]
    assert "gpu" in refused(capsys, *SFT, *WORLD, *QUICK, *gpu).lower()


def test_an_unknown_key_is_named(tmp_path, capsys):
    said = refused(
        capsys, *SFT, *WORLD, *QUICK, "--model.policy_typo", "1", "--trainer.default_root_dir", str(tmp_path / "run")
    )
    assert "policy_typo" in said
    assert not (tmp_path / "run").exists()


def test_an_unknown_field_of_the_architecture_is_named(tmp_path, capsys):
    wrong = [*SFT[:-1], json.dumps({**ARCHITECTURE, "hiden_size": 8})]
    said = refused(capsys, *wrong, *WORLD, *QUICK, "--trainer.default_root_dir", str(tmp_path / "run"))
    assert "hiden_size" in said
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_another_run_is_left_alone(tmp_path, capsys):
    run = tmp_path / "run"
    main([*SFT, *WORLD, *QUICK, "--trainer.default_root_dir", str(run)])
    weights = (run / "export" / "model.safetensors").read_bytes()
    capsys.readouterr()
    said = refused(capsys, *SFT, *WORLD, *QUICK, "--trainer.default_root_dir", str(run))
    assert "holds another run" in said
    assert "--overwrite true" in said
    assert (run / "export" / "model.safetensors").read_bytes() == weights


def test_overwriting_spares_a_folder_that_is_no_run(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    args = [*SFT, *WORLD, *QUICK, "--trainer.default_root_dir", str(tmp_path / "run"), "--overwrite", "true"]
    assert "not overwritten" in refused(capsys, *args)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"


def test_ppo_before_sft_says_which_command_makes_its_input(tmp_path, capsys, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    where = "runs/quickstart/sft/export"
    if (request.config.rootpath / where).exists():
        monkeypatch.chdir(tmp_path)
        (tmp_path / "configs").symlink_to(request.config.rootpath / "configs")
    run = str(tmp_path / "run")
    said = refused(capsys, "fit", "--config", "configs/quickstart/ppo.yaml", "--trainer.default_root_dir", run)
    assert where in said
    assert "fit --config configs/quickstart/sft.yaml" in said


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("[1.0]", "one each is due"),
        ("[float('nan')] * len(prompts)", "nan"),
        ("['good'] * len(prompts)", "not a number"),
    ],
    ids=["wrong count", "nan", "text"],
)
def test_a_reward_function_that_misbehaves_is_named(tmp_path, capsys, body, words):
    (tmp_path / "mine.py").write_text(f"def praise(prompts, completions):\n    return {body}\n")
    args = from_file("unused", tmp_path / "run")
    args[2] = "PPOModule"
    args[args.index("DemonstrationDataModule")] = "PromptDataModule"
    args[args.index("unused")] = "HHHWorld"
    args.remove("--data.split.validation=0")
    args += ["--model.reward", "FunctionReward", "--model.reward.function", f"{tmp_path}/mine.py:praise"]
    args += ["--import", f"{tmp_path}/mine.py"]
    args += ["--model.critic", "null", "--model.sampling.max_new_tokens", "4", "--data.batch_size", "4"]
    said = refused(capsys, *args)
    assert "praise" in said
    assert words in said


def test_a_policy_and_a_reward_model_that_read_text_differently_are_refused(tmp_path, capsys):
    args = from_file("unused", tmp_path / "run")
    tokenizer = world_tokenizer()
    tokenizer.add_tokens(["quark"])
    export_folder(load_causal_lm(ModelSpec(architecture=ARCHITECTURE), tokenizer), tokenizer, tmp_path / "other")
    args[2] = "DPOModule"
    args[args.index("DemonstrationDataModule")] = "PreferenceDataModule"
    args[args.index("unused")] = "HHHWorld"
    args.remove("--data.split.validation=0")
    said = refused(capsys, *args, "--model.reference.path", str(tmp_path / "other"))
    assert "tokenizer" in said
    assert str(tmp_path / "other") in said


PPO = [
    "--model.reward",
    "GoldReward",
    "--model.reward.world",
    "HHHWorld",
    "--model.critic",
    "null",
    "--model.sampling.max_new_tokens",
    "4",
]


def ppo_on_the_world(tmp_path, *more):
    """A command line of PPO with a policy that nobody trained."""
    args = from_file("unused", tmp_path / "run", *more)
    args[2] = "PPOModule"
    args[args.index("DemonstrationDataModule")] = "PromptDataModule"
    args[args.index("unused")] = "HHHWorld"
    args.remove("--data.split.validation=0")
    return [*args, "--data.source.prompts", "8", "--data.batch_size", "4", *PPO]


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("accumulate_grad_batches", "2", "model.update.micro_batch_size"),
        ("gradient_clip_val", "0.5", "set model.update.max_grad_norm to 0.5"),
    ],
)
def test_flags_of_a_trainer_that_does_not_step_are_refused_before_the_first(tmp_path, capsys, flag, value, words):
    said = refused(capsys, *ppo_on_the_world(tmp_path, f"--trainer.{flag}", value))
    assert words in said
    assert not (tmp_path / "run").exists()


def test_fewer_rows_than_ranks_are_refused(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "who", "completion": "anna"}) + "\n")
    data = DemonstrationDataModule(str(path), str(policy_folder(tmp_path)), batch_size=2, split=Split(validation=0))
    data.prepare_data()
    data.setup("fit")
    data.trainer = SimpleNamespace(
        world_size=2,
        global_rank=0,
        accumulate_grad_batches=1,
        distributed_sampler_kwargs={"num_replicas": 2, "rank": 0},
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=False),
    )
    with pytest.raises(UserError, match=r"1 rows can't be shared by 2 ranks: .*trainer\.devices"):
        data.train_dataloader()


def test_fsdp1_is_refused_where_a_module_steps_its_own_optimizer():
    """Lightning makes no such strategy without a GPU, so the check is asked alone."""
    ppo: Any = PPOModule(ModelSpec(architecture=ARCHITECTURE), None, GoldReward(HHHWorld()))
    sft: Any = SFTModule(ModelSpec(architecture=ARCHITECTURE))
    for module in (ppo, sft):
        module._trainer = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(UserError, match=r"PPOModule steps its own optimizer.*fsdp2\.yaml"):
        shard_if_asked(ppo, torch.nn.Linear(1, 1))
    shard_if_asked(sft, torch.nn.Linear(1, 1))


def test_from_the_shell_a_mistake_is_one_line_and_exit_code_two(tmp_path):
    command = [sys.executable, "-m", "rlhf_lightning", *from_file(tmp_path / "none.jsonl", tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
