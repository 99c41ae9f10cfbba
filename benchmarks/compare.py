"""Our speed and memory beside others': one process a run, sides in turn, a JSON line a run, a table of medians and ratios.

python benchmarks/compare.py METHOD --size tiny --peer trl
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import SIDES  # noqa: E402
from benchmarks.problem import METHODS, ONLINE, SIZES, Spec, write  # noqa: E402
from benchmarks.table import Line, disturbed, table  # noqa: E402

PEERS = {
    "trl": {
        "sft": ["trl", "trl-padding-free", "trl-compact", "trl-padding-free-compact"],
        "reward": ["trl"],
        "dpo": ["trl", "trl-compact"],  # 1.16 has padding-free DPO switched off
        "kto": ["trl", "trl-compact"],
        "ppo": ["trl"],
        "grpo": ["trl", "trl-compact"],
        "rloo": ["trl", "trl-compact"],
    }
}


def python_of(side: str, method: str) -> Path:
    """The interpreter of a side.

    Raises:
        SystemExit: If its environment has not been made.
    """
    if not side.startswith("trl"):
        return Path(sys.executable)
    environment = ".venv-peers-ppo" if method == "ppo" else ".venv-peers"
    python = ROOT / environment / "bin" / "python"
    if not python.exists():
        raise SystemExit(f"side {side} needs {environment}; make it with: make {environment}/.installed")
    return python


def run_side(spec: Spec, python: Path) -> Line:
    """One run in a process of its own.

    Raises:
        SystemExit: If it fails; the end of what it said is printed first.
    """
    result, threads = Path(spec.folder, "result.json"), str(spec.threads)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [str(python), "-m", "benchmarks.measure", spec.json(), str(time.time()), str(result)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode:
        print(done.stdout[-4000:], file=sys.stderr)
        raise SystemExit(f"side {spec.side} of {spec.method} failed")
    line: Line = json.loads(result.read_text())
    return line | {"disturbed": disturbed(line)}


def sides_of(method: str, peer: str, chosen: str | None) -> list[str]:
    """The sides that were asked for, or all that the method has.

    Raises:
        SystemExit: If one is not known.
    """
    known = ["ours", *PEERS[peer][method], "naive", "bare"]
    sides = chosen.split(",") if chosen else known
    if unknown := [side for side in sides if side not in known]:
        raise SystemExit(f"{method} has no side {', '.join(unknown)}; it has {', '.join(known)}")
    assert set(known) <= set(SIDES)
    return sides


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--size", choices=["toy", "tiny", "small"], default="tiny")
    parser.add_argument("--peer", choices=sorted(PEERS), default="trl")
    parser.add_argument("--precision", choices=["32", "bf16"], default="32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--sides", help="comma-separated; all by default")
    parser.add_argument("--steps", type=int, help="timed steps a run (of methods that sample: iterations)")
    return parser.parse_args()


def main() -> None:
    """Write the problem, run the sides in turn, print."""
    asked = arguments()
    sides, size = sides_of(asked.method, asked.peer, asked.sides), SIZES[asked.size]
    pythons = {side: python_of(side, asked.method) for side in sides}
    warmup, steps = size.ppo_steps if asked.method in ONLINE else size.steps
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        shape = (asked.precision, asked.threads, warmup, asked.steps or steps, folder)
        specs = {side: Spec(asked.method, asked.size, side, *shape) for side in sides}
        first = specs[sides[0]]
        write(first.shape, Path(folder), first.batch_size * (first.warmup + first.steps))
        for _ in range(asked.rounds):
            for side in sides:
                lines.append(run_side(specs[side], pythons[side]))
                print(json.dumps(lines[-1]), flush=True)
    print(f"\n{table(lines)}")


if __name__ == "__main__":
    main()
