"""What our steps cost in seconds and memory as tokens, vocabulary, group, response and ranks grow.

python benchmarks/scaling.py [AXIS ...]
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.problem import Spec, write  # noqa: E402


class Point(NamedTuple):
    """One run: the tiny network with some of its sizes changed."""

    axis: str
    value: int
    method: str
    changes: dict[str, Any]
    ranks: int = 1


def lengths(tokens: int) -> list[int]:
    """All of one length: median, spread, least and most."""
    return [tokens, 0, tokens, tokens]


def sft(axis: str, value: int, **changes: Any) -> Point:
    return Point(axis, value, "sft", changes)


def ppo(axis: str, value: int, **changes: Any) -> Point:
    return Point(axis, value, "ppo", {"rollouts": 32, "epochs": 1, **changes})


POINTS = [
    *(sft("tokens", 160 * rows, rows=rows, prompt=lengths(40), response=lengths(120)) for rows in (4, 16, 64)),
    *(sft("vocabulary", size, vocabulary=size) for size in (1024, 8192, 65536)),
    *(ppo("group", size, group=size, prompt=lengths(128), response=lengths(32)) for size in (1, 4, 16)),
    *(ppo("response", size, prompt=lengths(40), response=lengths(size)) for size in (32, 128, 256)),
    *(Point("ranks", ranks, "sft", {"rows": 32}, ranks) for ranks in (1, 2)),
]


def measure(point: Point, folder: Path) -> dict[str, Any]:
    """The line of a point; of several ranks that of the first."""
    spec = Spec(point.method, "tiny", "ours", "32", 1, 1, 3, str(folder), ranks=point.ranks, changes=point.changes)
    write(spec.shape, folder, spec.batch_size * (spec.warmup + spec.steps))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if point.ranks > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "NODE_RANK": "0"}
        environment |= {"WORLD_SIZE": str(point.ranks)}
    processes = []
    for rank in range(point.ranks):
        own = environment | ({"LOCAL_RANK": str(rank)} if point.ranks > 1 else {})
        result = str(folder / f"{rank}.json")
        command = [sys.executable, "-m", "benchmarks.measure", spec.json(), str(time.time()), result]
        with (folder / f"{rank}.log").open("w") as log:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=own, stdout=log, stderr=subprocess.STDOUT))
    for rank, process in enumerate(processes):
        if process.wait(timeout=300):
            print((folder / f"{rank}.log").read_text()[-4000:], file=sys.stderr)
            raise SystemExit(f"{point.axis} {point.value} failed")
    line: dict[str, Any] = json.loads((folder / "0.json").read_text())
    return {"axis": point.axis, "value": point.value, **line}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def row(line: dict[str, Any]) -> str:
    """A row of the table."""
    cpu = line["cpu_seconds"] / line["steps"]
    parts = "/".join(f"{line[f'{part}_s']:.3f}" if f"{part}_s" in line else "-" for part in ("generation", "update"))
    return (
        f"| {line['axis']} | {line['value']} | {line['method']} | {line['tokens']:.0f} | {cpu:.3f} | {line['step_s']:.3f} "
        f"| {1e6 * cpu / line['tokens']:.0f} | {parts} | {line['peak_rss_mb']:.0f} "
        f"| {line['peak_rss_mb'] - line['rss_before_mb']:.0f} |"
    )


def main() -> None:
    """Every point of the axes that were asked for, each in fresh processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    axes = list(dict.fromkeys(point.axis for point in POINTS))
    parser.add_argument("axes", nargs="*", help=f"of {', '.join(axes)}; all by default")
    asked = parser.parse_args().axes or axes
    if unknown := set(asked) - set(axes):
        raise SystemExit(f"no axis {', '.join(sorted(unknown))}; there are {', '.join(axes)}")
    rows = []
    for point in POINTS:
        if point.axis in asked:
            with tempfile.TemporaryDirectory() as folder:
                line = measure(point, Path(folder))
            print(json.dumps(line), flush=True)
            rows.append(row(line))
    print("\n| axis | value | step | tokens | CPU s | wall s | µs a token | gen/upd CPU s | MB | above start MB |")
    print("\n".join(["| --- " * 10 + "|", *rows]))


if __name__ == "__main__":
    main()
