"""Every method beside every other: gold reward against KL over seeds, under the envelope that no method can pass."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_lightning.errors import UserError, harmless
from rlhf_lightning.models.export import replace_file

WHERE = "held_out/sampled"
Z_975 = 1.959964  # the normal quantile
T_975 = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
}  # Student's, by seeds


def envelope(rewards: NDArray[np.floating], betas: NDArray[np.floating]) -> tuple[list[float], list[float]]:
    r"""The best reward that can be had for a KL, from samples of the policy that all methods start from.

    .. math:: w_j \propto e^{r_j / \beta}, \quad R = \sum_j w_j r_j, \quad KL = \sum_j w_j \log(n w_j)

    The optimum of reward less beta times KL, of the samples' own distribution: what reweighs a prompt's n samples can't be
    better. Above log n nats it says nothing, and short of that it is a little low, for n samples do not hold all good answers.

    Args:
        rewards: Of n samples a prompt. Shape (prompts, n).
        betas: Weights of the KL, large ones first. Shape (points,).

    Returns:
        KL in nats and reward at each beta, means over the prompts.

    Source: Rafailov et al. 2023, eq. 4, https://arxiv.org/abs/2305.18290, with self-normalised weights.
    """
    kls, best = [], []
    for beta in betas:
        tilted = rewards / beta
        log_w = tilted - np.logaddexp.reduce(tilted, axis=1, keepdims=True)
        w = np.exp(log_w)
        kls.append(float((w * (log_w + math.log(rewards.shape[1]))).sum(axis=1).mean()))
        best.append(float((w * rewards).sum(axis=1).mean()))
    return kls, best


def attainable(curve: dict[str, list[float]], kl: float) -> float:
    """The envelope at a KL; beyond its last point, its last value."""
    return float(np.interp(kl, curve["kl"], curve["gold"]))


def leaderboard(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of every policy over the seeds.

    Args:
        reports: Of one pipeline with several seeds: ``policies``, ``seconds`` and ``envelope`` each.

    Returns:
        ``methods``: for each policy gold reward and KL (mean and half-width of the 95 % interval over seeds, and the figures of
        each seed), median seconds, and whether a seed lies above the envelope. ``envelope``: mean over the seeds.

    Raises:
        UserError: If the reports do not speak of the same policies.
    """
    names = list(reports[0]["policies"])
    for report in reports:
        if list(report["policies"]) != names:
            raise UserError(
                f"seeds {reports[0]['seed']} and {report['seed']} have other policies; run the pipeline again"
            )
    curves = [report["envelope"] for report in reports]
    methods = {}
    for name in names:
        parts = [report["policies"][name][WHERE] for report in reports]
        gold, kl = [part["gold"]["mean"] for part in parts], [part["kl"] for part in parts]
        best = [attainable(curve, x) for curve, x in zip(curves, kl, strict=True)]
        widths = [part["gold"]["high"] - part["gold"]["mean"] for part in parts]
        methods[name] = {
            "gold": spread(gold),
            "kl": spread(kl),
            "gold_of_seeds": gold,
            "kl_of_seeds": kl,
            "seconds": float(np.median([report["seconds"].get(name, math.nan) for report in reports])),
            "above_envelope": any(g - w > b for g, w, b in zip(gold, widths, best, strict=True)),
        }
    mean = {axis: np.mean([curve[axis] for curve in curves], axis=0).tolist() for axis in ("kl", "gold")}
    return {"seeds": [report["seed"] for report in reports], "methods": methods, "envelope": mean}


def spread(values: list[float]) -> dict[str, float]:
    """Mean, and half the width of Student's 95 % interval (0 for a single value)."""
    if len(values) == 1:
        return {"mean": values[0], "half": 0.0}
    t = T_975.get(len(values)) or student_quantile(len(values) - 1)
    return {"mean": float(np.mean(values)), "half": float(t * np.std(values, ddof=1) / math.sqrt(len(values)))}


def student_quantile(freedom: int) -> float:
    """The 97.5 % point of Student's distribution with 10 degrees of freedom or more, to three digits after the point.

    Source: Abramowitz and Stegun 1964, 26.7.5, the first four terms.
    """
    z, n = Z_975, freedom
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / n + second / n**2 + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)


def draw(board: dict[str, Any]) -> Figure:
    """Each method's seeds as points, its mean as a label, and the envelope."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(board["envelope"]["kl"], board["envelope"]["gold"], color="black", linewidth=1.2, label="best attainable")
    for number, (name, found) in enumerate(board["methods"].items()):
        color = f"C{number % 10}"
        axes.plot(found["kl_of_seeds"], found["gold_of_seeds"], ".", color=color, alpha=0.5)
        at = found["kl"]["mean"], found["gold"]["mean"]
        axes.annotate(harmless(name), at, fontsize=7, color=color)
    axes.set(xlabel="KL from the SFT policy, nats a response", ylabel="gold reward, held-out prompts")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


def write_leaderboard(board: dict[str, Any], folder: Path) -> Path:
    """``leaderboard.json``, ``leaderboard.md``, ``leaderboard.png``, and the table in the terminal.

    Returns:
        The picture.
    """
    replace_file(folder / "leaderboard.json", json.dumps(board, indent=2))
    rows = sorted(board["methods"].items(), key=lambda item: -item[1]["gold"]["mean"])
    lines = ["| method | gold reward | KL, nats | seconds |", "| --- | --- | --- | --- |"]
    table = Table(
        title=f"seeds {', '.join(map(str, board['seeds']))}; ± is a 95 % interval over them", title_justify="left"
    )
    for column in ("method", "gold reward", "KL", "seconds", ""):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, found in rows:
        figures = (f"{found['gold']['mean']:.2f} ± {found['gold']['half']:.2f}", f"{found['kl']['mean']:.2f}")
        seconds = f"{found['seconds']:.0f}" if math.isfinite(found["seconds"]) else ""
        lines.append(f"| {name} | {figures[0]} | {figures[1]} | {seconds} |")
        table.add_row(Text(harmless(name)), *figures, seconds, "above the envelope" if found["above_envelope"] else "")
    replace_file(folder / "leaderboard.md", "\n".join(lines) + "\n")
    Console().print(table)
    path = folder / "leaderboard.png"
    draw(board).savefig(path, dpi=120)
    return path
