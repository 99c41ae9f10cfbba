"""PPO on the embedded world with vLLM's responses reaches what it reaches with our own; both engines' speed is printed."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rlhf_lightning.data.encoding import encode_prompt
from rlhf_lightning.evaluation.answers import Answerer
from rlhf_lightning.evaluation.world import judge
from rlhf_lightning.generation.engine import SamplingParameters
from rlhf_lightning.generation.native import NativeEngine
from rlhf_lightning.generation.vllm_engine import VLLMEngine
from rlhf_lightning.models.export import eos_ids
from rlhf_lightning.worlds import HHHWorld
from tests.with_vllm.problem import SMALL, left_padded, needs_vllm

pytestmark = [needs_vllm, pytest.mark.exhaustive, pytest.mark.timeout(5400)]
ROOT, SEEDS = Path(__file__).parents[2], (1, 2, 3)
SPREAD = 2.776  # 97.5 % of Student's t for two means of three runs each


def fit(config, root, *flags):
    command = [sys.executable, "-m", "rlhf_lightning", "fit", "-c", f"configs/quickstart/{config}.yaml", *flags]
    command += ["--trainer.default_root_dir", str(root), "--wandb", "disabled"]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    print(f"{Path(root).name}: {time.monotonic() - started:.0f} s")


def places(folder):
    """Where PPO's three models are."""
    reward = f"{folder}/reward/export"
    return [
        f"--model.policy.path={folder}/sft/export",
        f"--model.critic.path={reward}",
        f"--model.reward.init_args.path={reward}",
    ]


def differences(run):
    """The largest difference between the engine's and the policy's log-probabilities in each iteration, nats."""
    with (run / "metrics.csv").open() as file:
        found = [row.get("train/sampling/sampling_logp_difference/max") for row in csv.DictReader(file)]
    return [float(value) for value in found if value]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of an earlier test are taken from the folder VLLM_PPO_RUNS, if it is given; none of them is quick.

    The quickstart, with heads of a width that vLLM's CPU attention knows; PPO with either engine.
    """
    folder = Path(os.environ.get("VLLM_PPO_RUNS") or tmp_path_factory.mktemp("ppo"))
    heads = ["--model.policy.architecture.num_attention_heads", "3"]
    stages = {"sft": ("sft", *heads), "reward": ("reward", "--model.network.path", f"{folder}/sft/export")}
    for seed in SEEDS:
        seeded = [*places(folder), "--seed_everything", str(seed)]
        stages[f"native_{seed}"] = ("ppo", *seeded)
        stages[f"vllm_{seed}"] = ("ppo", "-c", "configs/engine/vllm.yaml", *seeded)
    for name, (config, *flags) in stages.items():
        if not (folder / name / "export" / "config.json").is_file():
            fit(config, folder / name, *flags)
    return folder


def gold(runs, name):
    """Mean gold reward of a run's policy on held-out prompts."""
    world = HHHWorld()
    prompts = list(world.load("prompts")["validation"]["prompt"])[:1000]
    answers = Answerer(runs / name / "export", runs / "sft/export").answer(
        prompts, SamplingParameters(24), samples=2, seed=0
    )
    return float(judge(world, answers).gold.mean())


def test_ppo_reaches_the_gold_reward_of_our_own_engine(runs):
    reached = {
        engine: torch.tensor([gold(runs, f"{engine}_{seed}") for seed in SEEDS]) for engine in ("native", "vllm")
    }
    before = gold(runs, "sft")
    print(f"gold reward: {before:.3f} before; " + "; ".join(f"{k} {v.tolist()}" for k, v in reached.items()))
    apart = float(reached["vllm"].mean() - reached["native"].mean())
    interval = SPREAD * float(((reached["vllm"].var() + reached["native"].var()) / len(SEEDS)).sqrt())
    print(f"vLLM {reached['vllm'].mean():.3f}, native {reached['native'].mean():.3f}: {apart:+.3f} ± {interval:.3f}")
    assert reached["native"].mean() > before + 0.4
    assert abs(apart) < max(interval, 0.05)


@pytest.mark.parametrize("seed", SEEDS)
def test_after_each_update_the_log_probabilities_are_the_policys(runs, seed):
    apart = differences(runs / f"vllm_{seed}")
    print(f"seed {seed}: at most {max(apart):.1e} nats over {len(apart)} iterations")
    assert len(apart) > 60
    assert max(apart) < 1e-4


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_with_an_engine_each(runs, tmp_path, strategy):
    flags = ["--trainer.devices", "2", "--trainer.strategy", strategy, "--trainer.max_steps", "12"]
    fit("ppo", tmp_path / strategy, "-c", "configs/engine/vllm.yaml", *places(runs), *flags)
    apart = differences(tmp_path / strategy)
    assert len(apart) == 3
    assert max(apart) < 1e-4


def test_tokens_a_second_of_both_engines(runs):
    answerer = Answerer(runs / "vllm_1" / "export", runs / "sft/export")
    network, tokenizer, sampling = answerer.policy.network.network, answerer.tokenizer, SamplingParameters(24)
    rows = [encode_prompt(tokenizer, prompt) for prompt in HHHWorld().load("prompts")["validation"]["prompt"][:256]]
    ids, mask = left_padded(rows)
    vllm = VLLMEngine(kv_cache_gib=0.5, options=SMALL | {"max_num_seqs": 256})
    engines, speeds = {"native": NativeEngine(), "vllm": vllm}, {}
    for name, engine in engines.items():
        engine.take_weights(network, tokenizer, 0)
        for _ in range(3):
            torch.manual_seed(0)
            began = time.perf_counter()
            drawn = engine.generate(network, ids, mask, sampling, eos_ids=eos_ids(network, tokenizer), pad_id=0)
            tokens = int((drawn.logprobs != 0).sum())
            speeds.setdefault(name, []).append(tokens / (time.perf_counter() - began))
    vllm.close()
    print(
        "tokens a second, 256 prompts, three times: "
        + "; ".join(f"{n} {[int(x) for x in s]}" for n, s in speeds.items())
    )
    assert all(len(each) == 3 for each in speeds.values())
