"""Training held against a known optimum: the learning curve, the verdict, the table and the picture."""

import csv
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf_lightning.evaluation.exact import Exact, Target, policy_logps, target_of
from rlhf_lightning.functional.optimum import frontier
from rlhf_lightning.models.actor_critic import ActorCritic

matplotlib.use("agg", force=False)
PREFIX = "exact/"
REPORT = "ground_truth.json"


@dataclass(frozen=True)
class Tolerance:
    """What a correct run of the given settings stays below.

    Attributes:
        kl_to_optimum: Nats.
        lost_percent: Share of V* - V_ref; None where sampling noise of the data decides it.
        gradient_error: See :func:`rlhf_lightning.evaluation.gradients.gradient_error`.
    """

    kl_to_optimum: float
    lost_percent: float | None
    gradient_error: float = 1e-5


# At beta 1, 400 responses, 400 x 256 samples (PPO) or 20,000 pairs (DPO, IPO). Bugs that convergence can see exceed these
# tenfold, those that it can't see exceed the gradient's thousandfold.
TOLERANCES = {
    "PPO": Tolerance(kl_to_optimum=1e-2, lost_percent=3.0),
    "DPO": Tolerance(kl_to_optimum=5e-2, lost_percent=None),
    "IPO": Tolerance(kl_to_optimum=5e-2, lost_percent=None),
    # As PPO, from 500 steps x 256 samples.
    **{name: Tolerance(kl_to_optimum=1e-2, lost_percent=3.0) for name in ("LeaveOneOut", "BatchMean", "ReturnToGo")},
    **{name: Tolerance(kl_to_optimum=1e-2, lost_percent=3.0) for name in ("GroupMean", "GreedyBaseline")},
}


class OptimumCurve(Callback):
    """Logs where the policy stands, exactly, along its training on an enumerable world: ``exact/...``.

    Attributes:
        points: Figures so far, each with its ``step`` (of the optimizer).
        target: The optimum, once training has begun.
    """

    target: Target

    def __init__(self, every_n_batches: int = 10) -> None:
        """Remember how often.

        Args:
            every_n_batches: Batches (PPO: iterations) between two measurements.
        """
        self.every_n_batches = every_n_batches
        self.points: list[dict[str, float]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises UserError if the module's optimum is not known on this data."""
        self.target = target_of(pl_module, _world(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.fit_loop.epoch_loop.total_batch_idx + 1) % self.every_n_batches == 0:
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.points[-1]["step"] != pl_module.global_step:
            self._look(trainer, pl_module)

    @torch.no_grad()
    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logps = policy_logps(trained_policy(pl_module), _world(trainer), self.target.temperature).cpu()
        figures = asdict(self.target.exact(logps))
        self.points.append({"step": pl_module.global_step, **figures})
        for logger in trainer.loggers:
            logger.log_metrics({PREFIX + name: value for name, value in figures.items()}, step=pl_module.global_step)


def _world(trainer: Any) -> Any:
    return trainer.datamodule.source


def trained_policy(module: Any) -> Any:
    """The policy network of PPO or DPO."""
    return (
        module.actor_critic.policy if isinstance(getattr(module, "actor_critic", None), ActorCritic) else module.policy
    )


def read_curve(metrics: Path) -> list[dict[str, float]]:
    """The points that :class:`OptimumCurve` logged into a run's metrics.csv."""
    with metrics.open() as file:
        rows = [row for row in csv.DictReader(file) if row.get(f"{PREFIX}kl_to_optimum")]
    return [
        {"step": float(row["step"])}
        | {name.removeprefix(PREFIX): float(value) for name, value in row.items() if name.startswith(PREFIX)}
        for row in rows
    ]


def verdict(method: str, exact: Exact, gradient_error: float) -> list[str]:
    """What is out of tolerance; empty for a pass."""
    tolerance, found = TOLERANCES[method], {**asdict(exact), "gradient_error": gradient_error}
    limits = {name: limit for name, limit in asdict(tolerance).items() if limit is not None}
    wrong = [f"{name} {found[name]:.2g} > {limit:g}" for name, limit in limits.items() if not found[name] < limit]
    if exact.reward > exact.frontier_reward + 1e-3:
        wrong.append(f"reward {exact.reward:.4f} above the frontier's {exact.frontier_reward:.4f}")
    return wrong


COLUMNS = (
    "problem",
    "KL(pi||pi*)",
    "lost %",
    "reward",
    "frontier",
    "KL(pi||ref)",
    "V_ref",
    "V*",
    "gradient error",
    "verdict",
)


def table(report: dict[str, Any]) -> str:
    """One line a problem; as wide as it is, whatever the terminal."""
    lines = [f"{report['method']}, beta {report['beta']:g}", "  ".join(COLUMNS)]
    for problem in report["problems"]:
        exact, target = problem["final"], problem["target"]
        figures = [str(problem["problem"]), f"{exact['kl_to_optimum']:.2e}", f"{exact['lost_percent']:.2f}"]
        figures += [f"{exact[name]:.4f}" for name in ("reward", "frontier_reward", "kl")]
        figures += [
            f"{target['reference']['reward']:.4f}",
            f"{target['value']:.4f}",
            f"{problem['gradient_error']:.1e}",
        ]
        outcome = "; ".join(problem["out_of_tolerance"]) or "pass"
        lines.append("  ".join([*(f.rjust(len(c)) for f, c in zip(figures, COLUMNS, strict=False)), outcome]))
    return "\n".join(lines)


def draw(report: dict[str, Any], targets: list[Target], path: Path) -> None:
    """The learning curves against the optimum, and the runs in the plane of KL and reward under their frontiers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    limit = TOLERANCES[report["method"]].kl_to_optimum
    left.axhline(limit, color="grey", linestyle=":", label=f"tolerance, {limit:g}")
    for number, (problem, target) in enumerate(zip(report["problems"], targets, strict=True)):
        curve, color = problem["curve"], f"C{number}"
        left.semilogy([p["step"] for p in curve], [p["kl_to_optimum"] for p in curve], color=color)
        kl, best = frontier(target.ref_logps, target.rewards, torch.logspace(1.5, -0.2, 40) * target.beta)
        right.plot(kl, best, color=color, linestyle="--", linewidth=1)
        points = [p["kl"] for p in curve], [p["reward"] for p in curve]
        right.plot(*points, color=color, marker=".", label=f"problem {problem['problem']}")
        optimum = problem["target"]["optimum"]
        right.plot(optimum["kl"], optimum["reward"], color=color, marker="*", markersize=12)
    left.set(xlabel="optimizer step", ylabel="KL from the policy to the optimum, nats", title=report["method"])
    right.set(xlabel="KL from the reference, nats", ylabel="expected reward", title="star: optimum; dashed: frontier")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=110)


def write(report: dict[str, Any], targets: list[Target], folder: Path) -> None:
    """``ground_truth.json`` and ``ground_truth.png``."""
    draw(report, targets, folder / "ground_truth.png")
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
