"""Adapters from the command line: they learn, leave what others read, go on bit for bit, and share one base over ranks."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.resume.runs import Crew, Signal, arguments, differences

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
MODEL = DATA / "stories260K-hf"
real = pytest.mark.skipif(not MODEL.is_dir(), reason="no real data beside the project")


def run(*arguments):
    command = [sys.executable, "-m", "rlhf_lightning", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def logged(folder, name):
    """The values that a run has logged under a name, in their order."""
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


# ---------------------------------------------------------------- a real model


def recipe(command, name, folder, *flags):
    common = ["--wandb", "disabled", "--samples.every_n_steps", "0", "--trainer.enable_progress_bar", "false"]
    common += ["--trainer.num_sanity_val_steps", "0", "--trainer.default_root_dir", str(folder)]
    run(command, "-c", f"configs/recipes/{name}.yaml", "--model.policy.path", str(MODEL), *flags, *common)


def check_exports(folder, rank):
    """Merged and alone, the export is the same policy, and it is not the base."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "export")
    # In float64, so that what differs is the merge and not the order of its sums.
    paths = folder / "export", MODEL
    merged, base = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in paths)
    ids = torch.tensor([tokenizer("Once upon a time, there was a little").input_ids])
    with torch.no_grad():
        before = base(ids).logits
        peft = PeftModel.from_pretrained(base, folder / "export" / "adapter").double()(ids).logits
        torch.testing.assert_close(merged(ids).logits, peft, rtol=1e-5, atol=1e-5)
        assert (peft - before).abs().max() > 0.1
    config = json.loads((folder / "export" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (rank, str(MODEL))


def weights_in(folder):
    """How many numbers the last checkpoint holds as weights."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return sum(w.numel() for w in checkpoint["state_dict"].values() if w.is_floating_point())


def adapter_size(rank):
    """Of all linear layers of stories260K: five blocks of width 64, 8 query and 4 key heads, 172 wide inside."""
    one = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 172), (64, 172), (172, 64)]
    return 5 * sum(rank * (i + o) for i, o in one)


@real
def test_dpo_with_an_adapter_learns_and_goes_on_to_the_next_stage(tmp_path):
    pairs = str(DATA / "rasbt" / "instruction-data-with-preference.json")
    folder = tmp_path / "dpo"
    recipe("fit", "polite_lora_dpo", folder, "--data.source", pairs, "--trainer.max_epochs", "1")
    assert logged(folder, "eval/rewards/accuracies")[-1] > 0.75
    assert logged(folder, "eval/rewards/margins")[-1] > 0.5
    check_exports(folder, rank=8)
    assert weights_in(folder) == adapter_size(8)

    # A next stage reads the merged folder as it reads any; one that goes on with the adapter begins where that is.
    once = ["--data.source", pairs, "--trainer.max_steps", "1", "--trainer.log_every_n_steps", "1"]
    recipe(
        "fit", "polite_dpo", tmp_path / "more", *once, "--model.policy.adapter.path", str(folder / "export" / "adapter")
    )
    recipe("fit", "polite_dpo", tmp_path / "merged", *once, "--model.policy.path", str(folder / "export"))
    for name in ("train/logps/chosen", "train/logps/rejected"):
        (more,), (merged,) = (logged(tmp_path / run, name) for run in ("more", "merged"))
        assert more == pytest.approx(merged, rel=1e-4)
    assert logged(tmp_path / "more", "train/rewards/margins") == pytest.approx([0], abs=1e-3)


@real
def test_ppo_with_two_adapters_on_one_base_learns(tmp_path):
    pytest.importorskip("vaderSentiment")
    text = (DATA / "tinystories" / "tinystories_sample_2MiB.txt").read_text()
    stories = [story.strip() for story in text.split("<|endoftext|>")]
    openings = sorted({" ".join(s.split()[:8]) for s in stories if s.startswith("Once upon a time")})
    prompts = tmp_path / "openings.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": opening}) + "\n" for opening in openings))
    folder = tmp_path / "ppo"
    flags = ["--data.source", str(prompts), "--model.critic.path", str(MODEL)]
    recipe(
        "fit",
        "sentiment_lora_ppo",
        folder,
        *flags,
        "--trainer.max_steps",
        "72",
    )
    scores = logged(folder, "train/objective/scores")
    assert scores[0] < -0.3  # minus the compound sentiment: cheerful stories
    assert logged(folder, "eval/sampled/score")[-1] > scores[0] + 0.3
    assert logged(folder, "train/objective/kl")[0] == pytest.approx(0, abs=1e-3)
    assert logged(folder, "train/objective/kl")[-1] > 1
    assert logged(folder, "train/val/explained_variance")[-1] > 0.3  # the critic's adapter has learnt
    check_exports(folder, rank=8)
    assert weights_in(folder) == 2 * adapter_size(8) + 64 + 3  # two adapters, a head, its scale, shift and temperature


# ---------------------------------------------------------------- tiny runs


@pytest.fixture(scope="module")
def crew(tmp_path_factory):
    return Crew(tmp_path_factory.mktemp("adapters"))


def with_adapters(method, base):
    """Flags after those of a plain run."""
    policy = str(base / "policy")
    return {
        "sft": ["--model.policy", json.dumps({"path": policy, "architecture": None, "adapter": {"rank": 2}})],
        "reward": ["--model.network.adapter.rank", "2"],
        "dpo": ["--model.policy.adapter.rank", "2"],
        "ppo": ["--model.policy.adapter.rank", "2", "--model.critic.path", policy, "--model.critic.adapter.rank", "3"],
    }[method]


@pytest.mark.parametrize(
    ("method", "die"),
    [
        ("ppo", ("update", 31)),
        pytest.param("sft", ("batch", 19), marks=pytest.mark.exhaustive),
        pytest.param("reward", ("epoch end", 1), marks=pytest.mark.exhaustive),
        pytest.param("dpo", ("batch", 11), marks=pytest.mark.exhaustive),
    ],
)
def test_a_run_that_was_killed_goes_on_bit_for_bit(crew, method, die):
    flags = with_adapters(method, crew.base)
    whole = crew.finish(method, f"{method}-whole", *flags)
    run, folder = crew.run(method, f"{method}-killed", *flags, die=Signal(*die))
    assert run.join() == [-9], run.log.read_text()[-3000:]
    assert crew.go_on(method, f"{method}-killed", *flags).join() == [0]
    assert differences(whole, folder) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize(("method", "die"), [("dpo", ("batch", 5)), ("ppo", ("update", 16))])
def test_a_run_in_shards_that_was_killed_goes_on_bit_for_bit(crew, method, die):
    flags = [*with_adapters(method, crew.base), "--trainer.strategy", "fsdp2", "--trainer.max_epochs", "1"]
    whole = crew.finish(method, f"{method}-shards-whole", *flags, ranks=2)
    run, folder = crew.run(method, f"{method}-shards-killed", *flags, ranks=2, die=Signal(*die))
    assert run.join()[0] == -9, run.log.read_text()[-3000:]
    assert crew.go_on(method, f"{method}-shards-killed", *flags, ranks=2).join() == [0, 0]
    assert differences(whole, folder) == []


def test_the_export_command_does_what_the_run_did(crew, tmp_path):
    folder = crew.finish("dpo", "dpo-exported", *with_adapters("dpo", crew.base))
    run("export", "--run", str(folder), "--output", str(tmp_path / "again"))
    for name in ("model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / "export" / name).read_bytes()
    run("export", "--run", str(folder), "--output", str(tmp_path / "alone"), "--merge", "false")
    assert [p.name for p in (tmp_path / "alone").iterdir()] == ["adapter"]


FURTHER = [("dpo", "ddp"), *((method, strategy) for method in ("sft", "reward") for strategy in ("ddp", "fsdp2"))]


@pytest.fixture(scope="module")
def over_ranks(crew, tmp_path_factory):
    """``over_ranks(method, strategy)``: the folder of a run on two ranks, or on one for ``None``."""
    place, done = tmp_path_factory.mktemp("ranks"), {}

    def finished(method, strategy):
        if (method, strategy) not in done:
            folder = place / f"{method}-{strategy}"
            flags = [*with_adapters(method, crew.base), "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"]
            if strategy is not None:
                flags += ["--trainer.devices", "2", "--trainer.strategy", strategy, "--data.batch_size", "2"]
            run(*arguments(method, crew.base, folder, *flags))
            done[method, strategy] = folder
        return done[method, strategy]

    return finished


@pytest.mark.parametrize(
    ("method", "strategy"),
    [("dpo", "fsdp2"), *(pytest.param(m, s, marks=pytest.mark.exhaustive) for m, s in FURTHER)],
)
def test_two_ranks_train_the_adapter_that_one_does(over_ranks, method, strategy):
    one, two = over_ranks(method, None), over_ranks(method, strategy)
    assert len(logged(one, "train/loss")) == 6
    assert logged(two, "train/loss") == pytest.approx(logged(one, "train/loss"), rel=2e-5)
    compare_exports(one, two)


@pytest.mark.exhaustive
def test_two_adapters_on_one_base_are_the_same_whole_and_in_shards(over_ranks):
    """PPO's ranks draw responses of their own: two ranks are held against each other, not against one."""
    whole, shards = over_ranks("ppo", "ddp"), over_ranks("ppo", "fsdp2")
    for name in ("train/objective/kl", "train/loss/value_avg", "train/loss/policy_avg"):
        assert len(logged(whole, name)) == 12
        assert logged(shards, name) == pytest.approx(logged(whole, name), rel=1e-3, abs=1e-5)
    compare_exports(whole, shards)


def compare_exports(one, other):
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        expected, found = (load_file(folder / "export" / name) for folder in (one, other))
        assert expected.keys() == found.keys()
        for key, weight in expected.items():
            torch.testing.assert_close(found[key], weight, rtol=0, atol=2e-5, msg=key)
