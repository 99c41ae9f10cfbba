"""The leaderboard in miniature: two seeds, one stage of each kind that the real one has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
KEPT = ("sft", "reward", "simpo", "rloo", "raft_rows", "raft")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_leaderboard_in_miniature(tmp_path):
    plan = yaml.safe_load((ROOT / "configs/quickstart/leaderboard.yaml").read_text())
    plan["stages"] = [stage for stage in plan["stages"] if stage["name"] in KEPT]
    assert [stage["name"] for stage in plan["stages"]] == list(KEPT)
    for stage in plan["stages"]:
        fit = {"trainer.max_steps": 4, "trainer.limit_val_batches": 1}
        stage["options"] = fit if stage.get("command") != "sample" else {"prompts.limit": 16, "n": 4}
    settings = {"prompts": 8, "samples": 1, "best_of_samples": 0, "best_of_prompts": 8, "envelope_samples": 4}
    plan |= {"seeds": [5, 6], "output": str(tmp_path / "board")}
    plan["evaluation"] = {"class_path": "WorldEvaluation", "init_args": settings}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    command = [sys.executable, "-m", "rlhf_lightning", "pipeline", "--config", str(tmp_path / "plan.yaml")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "160"}
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    board = json.loads((tmp_path / "board" / "leaderboard.json").read_text())
    assert board["seeds"] == [5, 6]
    assert list(board["methods"]) == [name for name in KEPT if name not in ("reward", "raft_rows")]
    assert all(len(found["gold_of_seeds"]) == 2 for found in board["methods"].values())
    assert (tmp_path / "board" / "leaderboard.png").is_file()
    rows = [json.loads(line) for line in (tmp_path / "board/seed_6/raft_rows/samples.jsonl").read_text().splitlines()]
    assert len({json.dumps(row["prompt"]) for row in rows}) <= 16
    configs = [yaml.safe_load((tmp_path / f"board/seed_{seed}/simpo/config.yaml").read_text()) for seed in (5, 6)]
    seeds = [config["data"]["init_args"]["source"]["init_args"]["seed"] for config in configs]
    assert seeds == [5, 6]
    again = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "160"}
    )
    assert again.stdout.count("finished before") == 2 * len(KEPT)
