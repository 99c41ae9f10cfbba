"""Charts of the report as inline SVG: their text stays text, and their colours follow the page's light or dark scheme."""

import csv
import io
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from rlhf_lightning.errors import harmless

# What is drawn of each stage's metrics.csv, if it is there: title, and columns of the same unit.
CURVES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss", ("train/loss", "eval/loss")),
    ("accuracy", ("train/accuracy", "eval/accuracy", "train/rewards/accuracies", "eval/rewards/accuracies")),
    ("reward", ("train/objective/scores", "eval/sampled/score", "eval/greedy/score")),
    ("implicit reward", ("train/rewards/chosen", "train/rewards/rejected", "train/rewards/margins")),
    ("KL, nats a response", ("train/objective/kl", "eval/sampled/kl")),
    ("response length, tokens", ("train/objective/length", "eval/sampled/length")),
    ("entropy, nats a token", ("train/policy/entropy_avg", "train/entropy", "eval/entropy")),
    ("critic's explained variance", ("train/val/explained_variance",)),
)
INK = "#010203"  # written as `currentColor` into the SVG: the colour of the page's text
COLOURS = (
    "#2f7fd6",
    "#d9731a",
    "#279a5b",
    "#a35fcf",
    "#d3475b",
    "#1590a0",
)  # contrast of 3 and more on white and on black
STYLES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D", "v", "P")  # colour is never the only difference
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],  # what matplotlib measures with; the page replaces it
    **{f"{part}.color": INK for part in ("text", "xtick", "ytick")},
    **{f"axes.{part}color": INK for part in ("edge", "label", "title")},
    "axes.spines.top": False,
    "axes.spines.right": False,
    **{f"{part}.facecolor": "none" for part in ("figure", "axes", "savefig")},
    "grid.color": INK,
    "grid.alpha": 0.15,
}
Series = tuple[list[int], list[float]]


def stage_curves(path: Path) -> list[Markup]:
    """One small SVG a title of ``CURVES`` for which the file has columns."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    drawn = []
    for title, columns in CURVES:
        series = {name: points(rows, name) for name in columns if rows and name in rows[0]}
        series = {name: xy for name, xy in series.items() if xy[0]}
        if series:
            drawn.append(line_chart(title, series))
    return drawn


def points(rows: Iterable[dict[str, str]], column: str) -> Series:
    """Steps and values of one column, where it has a value."""
    known = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
    return [step for step, _ in known], [value for _, value in known]


def line_chart(title: str, series: dict[str, Series]) -> Markup:
    """A chart of values over optimizer steps as inline SVG.

    Args:
        title: Name and unit of the values.
        series: Steps and values by name.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(4.2, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for i, (name, (steps, values)) in enumerate(series.items()):
            few = "o" if len(steps) < 5 else None
            look: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)]}
            axes.plot(steps, values, marker=few, markersize=4, linewidth=1.6, label=harmless(name), **look)
        axes.set_title(harmless(title), fontsize=10)
        axes.set_xlabel("optimizer step", fontsize=8.5)
        axes.tick_params(labelsize=8)
        axes.grid()
        figure.legend(fontsize=8, frameon=False, loc="outside lower left", ncols=1 if len(series) > 2 else len(series))
        description = [
            f"{name} from {y[0]:.3g} at step {x[0]} to {y[-1]:.3g} at step {x[-1]}" for name, (x, y) in series.items()
        ]
        return as_svg(figure, f"{title} over optimizer steps: {'; '.join(description)}")


def reward_against_kl(
    points: dict[str, dict[str, Any]], reward: str, envelope: dict[str, list[float]] | None = None
) -> Markup:
    """Every policy as a labelled point with 95 % intervals of both coordinates.

    Args:
        points: By policy: ``kl`` and ``reward``, each with ``mean``, ``low`` and ``high``.
        reward: Name of the reward, with which the vertical axis is labelled.
        envelope: Best reward ("gold") that can be had at a ``kl``, where it was computed.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.5), layout="constrained")
        axes = figure.add_subplot()
        if envelope:
            axes.plot(envelope["kl"], envelope["gold"], color=INK, linewidth=1.2, alpha=0.7, label="best attainable")
            axes.legend(fontsize=9, frameon=False, loc="lower right")
        for i, point in enumerate(points.values()):
            (x, wide), (y, high) = (_with_bars(point[name]) for name in ("kl", "reward"))
            look: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            axes.errorbar([x], [y], xerr=wide, yerr=high, capsize=3, markersize=6, linestyle="none", **look)
        axes.set_xlabel("KL from the first policy, nats a response", fontsize=10)
        axes.set_ylabel(harmless(reward), fontsize=10)
        axes.tick_params(labelsize=9)
        axes.margins(0.14)
        axes.grid()
        _label(axes, {name: (point["kl"]["mean"], point["reward"]["mean"]) for name, point in points.items()})
        values = [(name, p["reward"], p["kl"]["mean"]) for name, p in points.items()]
        description = [
            f"{name}: {r['mean']:.2f} ({r['low']:.2f} to {r['high']:.2f}) at {kl:.2f} nats" for name, r, kl in values
        ]
        return as_svg(figure, f"{reward} against KL, with 95 % intervals; {'; '.join(description)}")


def _with_bars(value: dict[str, float]) -> tuple[float, list[list[float]]]:
    mean = value["mean"]
    return mean, [[max(mean - value["low"], 0.0)], [max(value["high"] - mean, 0.0)]]


def _label(axes: Axes, places: dict[str, tuple[float, float]]) -> None:
    """Write each name beside its point, where it covers neither a point nor another name."""
    canvas: Any = axes.figure.canvas
    canvas.figure.draw_without_rendering()
    at = {name: axes.transData.transform(xy) for name, xy in places.items()}
    scale = canvas.figure.dpi / 72
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in at.values()]
    inside = axes.get_window_extent()
    for name, (x, y) in at.items():
        shown = harmless(name)[:30]
        width, height = 6.2 * scale * len(shown), 12 * scale
        boxes = {}
        for (dx, dy), (align, base) in SIDES.items():
            left = x + dx * scale - (width if align == "right" else 0)
            low = y + dy * scale - (height if base == "top" else 0)
            boxes[dx, dy, align, base] = (left, low, left + width, low + height)
        hidden = {side: _covered(box, taken, inside) for side, box in boxes.items()}
        best = min(boxes, key=lambda side: hidden[side])
        dx, dy, align, base = best
        axes.annotate(
            shown,
            places[name],
            (dx, dy),
            textcoords="offset points",
            ha=align,
            va=base,
            fontsize=10,
        )
        taken.append(boxes[best])


SIDES = {(7, 5): ("left", "bottom"), (7, -5): ("left", "top"), (-7, 5): ("right", "bottom"), (-7, -5): ("right", "top")}
SIDES |= {(7, 18): ("left", "bottom"), (7, -18): ("left", "top"), (-7, 18): ("right", "bottom")}


def _covered(box: tuple[float, ...], taken: Sequence[tuple[float, ...]], inside: Any) -> float:
    """Area of a box that lies on others or outside of the axes."""
    over = sum(
        max(0.0, min(box[2], o[2]) - max(box[0], o[0])) * max(0.0, min(box[3], o[3]) - max(box[1], o[1])) for o in taken
    )
    width = max(0.0, min(box[2], inside.x1) - max(box[0], inside.x0))
    height = max(0.0, min(box[3], inside.y1) - max(box[1], inside.y0))
    return over + (box[2] - box[0]) * (box[3] - box[1]) - width * height


def as_svg(figure: Figure, description: str) -> Markup:
    """A figure as inline SVG.

    Args:
        figure: What is drawn.
        description: What a screen reader says of it.
    """
    buffer = io.StringIO()
    with rc_context(STYLE), warnings.catch_warnings():
        # Text stays text: the browser has letters that matplotlib's font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = (
        svg[svg.index("<svg") :]
        .replace(INK, "currentColor")
        .replace("'DejaVu Sans', sans-serif", "system-ui, sans-serif")
    )
    used = set(re.findall(r"#([\w.-]+)", svg))
    # Several charts share a page, and an id may occur once in it: those that nothing refers to are dropped.
    svg = re.sub(r'<(\w+) id="([\w.-]+)"', lambda found: found[0] if found[2] in used else f"<{found[1]}", svg)
    svg = re.sub(r'^<svg[^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1 ROLE>", svg, count=1)
    svg = svg.replace("ROLE", f'role="img" aria-label="{escape(harmless(description))}"', 1)
    return Markup(svg)
