"""From lines to a table: medians of the runs of each side, ratios between them, and whether they computed the same."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.problem import ONLINE

QUIET = 0.95  # CPU seconds a wall second; less, and others had a part of the core
TOLERANCE = {"32": 1e-4, "bf16": 2e-2}  # relative; a bfloat16 number has three digits
JUDGES = ("naive", "bare")  # the first that is there

Line = dict[str, Any]


def disturbed(line: Line) -> bool:
    """Whether other processes took enough of the core to make the wall clock useless."""
    return bool(line["cpu_over_wall"] < QUIET)


def rate_of(lines: list[Line]) -> str:
    """The key that the sides are compared by: of the wall clock if every run was quiet, else of CPU seconds."""
    name = "rollouts" if lines[0]["method"] in ONLINE else "tok"
    return f"{name}_cpu_s" if any(map(disturbed, lines)) else f"{name}_s"


def medians(lines: list[Line]) -> dict[str, Line]:
    """Of every number that a side's runs have, by side, in the order of their first runs."""
    sides: dict[str, list[Line]] = {}
    for line in lines:
        sides.setdefault(line["side"], []).append(line)
    return {side: _median(runs) for side, runs in sides.items()}


def _median(runs: list[Line]) -> Line:
    numbers = [key for key, value in runs[0].items() if isinstance(value, int | float)]
    return {key: statistics.median(run[key] for run in runs) for key in numbers} | {"runs": len(runs)}


def agreement(found: Line, judge: Line, tolerance: float) -> str:
    """Whether loss and gradient norm of the first step are those of the judge; "equal", or by how much they differ."""
    apart = {key: abs(found[key] / judge[key] - 1) for key in ("loss", "grad_norm")}
    wrong = [f"{key} off by {value:.1e}" for key, value in apart.items() if not value <= tolerance]
    return ", ".join(wrong) or "equal"


def table(lines: list[Line]) -> str:
    """A Markdown table, and above it what its ratios are made of.

    Args:
        lines: Of one method, size and precision.

    Raises:
        ValueError: If they are of several.
    """
    kinds = {tuple(line[key] for key in ("method", "size", "precision", "threads")) for line in lines}
    if len(kinds) != 1:
        raise ValueError(f"one table holds one kind of run, not {sorted(kinds)}")
    method, size, precision, threads = kinds.pop()
    found, rate = medians(lines), rate_of(lines)
    by = "CPU seconds, for a run was disturbed" if rate.endswith("_cpu_s") else "the wall clock; every run was quiet"
    head = f"{method} {size}, precision {precision}, {threads} thread{'s' * (threads > 1)}; ratios by {by}"
    rows = [_row(side, median, found, rate, TOLERANCE[precision]) for side, median in found.items()]
    names = ["side", "runs", *COLUMNS, "ours is", "our memory", "first step"]
    if method not in ONLINE:
        drop = [names.index(name) for name in ("decode", "gen / score / update s")]
        names, *rows = ([cell for i, cell in enumerate(row) if i not in drop] for row in (names, *rows))
    lines_ = ["| " + " | ".join(row) + " |" for row in (names, ["---"] * len(names), *rows)]
    return "\n".join([head, "", *lines_])


COLUMNS = ["per s", "per CPU s", "CPU/wall", "step s", "MB", "start s", "real", "tokens", "head", "decode",
           "gen / score / update s"]  # fmt: skip


def _row(side: str, median: Line, found: dict[str, Line], rate: str, tolerance: float) -> list[str]:
    name = rate.split("_")[0]
    parts = "/".join(_number(median.get(f"{part}_s")) for part in ("generation", "scoring", "update"))
    cells = [
        _number(median[f"{name}_s"]) + (" (disturbed)" if disturbed(median) else ""),
        _number(median[f"{name}_cpu_s"]),
        f"{median['cpu_over_wall']:.2f}",
        *(_number(median[key]) for key in ("step_s", "peak_rss_mb", "startup_s")),
        f"{median['real_fraction']:.2f}",
        *(_number(median.get(key)) for key in COUNTERS),
        parts,
    ]
    ours, judge = found.get("ours"), next((found[side] for side in JUDGES if side in found), None)
    faster = f"{ours[rate] / median[rate]:.2f}x" if ours else "-"
    memory = f"{ours['peak_rss_mb'] / median['peak_rss_mb']:.2f}x" if ours else "-"
    same = agreement(median, judge, tolerance) if judge else "not compared"
    shown = f"{median['loss']:.5g}, {median['grad_norm']:.5g}: {same}"
    return [side, str(median["runs"]), *cells, faster, memory, shown]


COUNTERS = ("matmul_tokens_per_real_token", "head_positions_per_response_token", "decode_row_steps_per_token")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    """``python -m benchmarks.table FILE``: the table of lines that were kept."""
    print(table([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines() if line.startswith("{")]))


if __name__ == "__main__":
    main()
