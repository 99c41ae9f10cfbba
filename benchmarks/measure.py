"""Clock, memory and counters of one run, and the process that makes it."""

import importlib
import json
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.problem import GROUPED, ONLINE, Spec, sequences

SIDES = {
    "ours": "benchmarks.side_ours",
    "naive": "benchmarks.side_naive",
    "bare": "benchmarks.side_bare",
    "trl": "benchmarks.side_trl",
    "trl-padding-free": "benchmarks.side_trl",
    "trl-compact": "benchmarks.side_trl",
    "trl-padding-free-compact": "benchmarks.side_trl",
    "trl-ppo": "benchmarks.side_trl_ppo",
    "trl-group": "benchmarks.side_trl_group",
}


class Meter:
    """Told by a side when its steps begin and end; knows the rest.

    The first step is compared with the other sides (loss, gradient norm) and its matrix products are counted; then come the
    other warm-up steps; timed is what lies between the end of the last of them and the end of the last step, so that
    fetching batches, the optimizer and the log are in it.
    """

    def __init__(self, spec: Spec, spawned: float) -> None:
        """Args: what is run, and the time at which its process was started."""
        self.spec, self.spawned, self.done = spec, spawned, 0
        self.found: dict[str, float] = {}
        self.phases: dict[str, float] = defaultdict(float)
        self.positions = 0
        self._counter: Any = None
        self._marks: list[tuple[float, float]] = []

    # ---------------------------------------------------------------- steps

    def start(self) -> None:
        """A step begins."""
        if self.done == 0 and "startup_s" not in self.found:
            self.found |= {"startup_s": time.time() - self.spawned, "rss_before_mb": _peak_mb()}
            if self._counter is not None:
                self._counter.__enter__()

    def stop(self) -> None:
        """A step has ended."""
        if self.done == 0 and self._counter is not None:
            self._counter.__exit__(None, None, None)
        self._synchronize()
        self.done += 1
        if self.done in (self.spec.warmup, self.spec.warmup + self.spec.steps):
            self._marks.append((time.perf_counter(), time.process_time()))

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step of a loop written by hand."""
        self.start()
        yield
        self.stop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around a part of a step: its seconds are summed over the timed steps, its counts kept apart."""
        begun = self.enter(name)
        yield
        self.leave(name, begun)

    def enter(self, name: str) -> float:
        """A part begins; returns what :meth:`leave` wants to know."""
        self._synchronize()
        if self._counter is not None:
            self._counter.phase = name
        return self._clock()

    def leave(self, name: str, begun: float) -> None:
        """A part has ended."""
        self._synchronize()
        if self.done >= self.spec.warmup:
            self.phases[name] += self._clock() - begun
        if self._counter is not None:
            self._counter.phase = ""

    def _clock(self) -> float:
        """CPU seconds, of which other processes take none; on a GPU those of the wall."""
        return time.process_time() if self.spec.device == "cpu" else time.perf_counter()

    def _synchronize(self) -> None:
        if self.spec.device != "cpu":
            import torch

            torch.cuda.synchronize()

    # ---------------------------------------------------------------- what the first step shows

    def watch(self, head: Any, first: Any) -> None:
        """Count rows that meet these weights in the first step.

        Args:
            head: Weight of the language-model head, or None; a tensor of shape (vocabulary, hidden).
            first: Weight of the first linear layer of the trained trunk, (outputs, hidden).
        """
        from benchmarks.counters import RowCounter

        self._counter = RowCounter({"head": head, "first": first})

    def compare(self, loss: float, grad_norm: float) -> None:
        """Loss and gradient norm of the first step; later ones are ignored."""
        if "loss" not in self.found:
            self.found |= {"loss": loss, "grad_norm": grad_norm}

    def fed(self, positions: int) -> None:
        """How many positions, padding included, the batch has that a step's networks are given."""
        if self.done == 0 and not self.positions:
            self.positions = positions

    # ---------------------------------------------------------------- result

    def result(self) -> dict[str, Any]:
        """One line of the benchmark.

        Raises:
            RuntimeError: If the side stopped early.
        """
        spec = self.spec
        if len(self._marks) != 2:
            raise RuntimeError(f"{spec.side} made {self.done} steps of {spec.warmup + spec.steps}")
        (wall0, cpu0), (wall1, cpu1) = self._marks
        wall, cpu = wall1 - wall0, cpu1 - cpu0
        timed = [row for batch in spec.batches()[spec.warmup :] for row in batch]
        amounts = {"tok": _tokens(spec.method, timed)[0]}
        if spec.method in ONLINE:
            amounts["rollouts"] = len(timed)
        rates = {f"{name}_s": amount / wall for name, amount in amounts.items()}
        rates |= {f"{name}_cpu_s": amount / cpu for name, amount in amounts.items()}
        return {
            **{name: getattr(spec, name) for name in ("method", "size", "side", "precision", "threads", "steps")},
            "tokens": amounts["tok"] / spec.steps,
            **rates,
            "cpu_seconds": cpu,
            "cpu_over_wall": cpu / wall,
            "step_s": wall / spec.steps,
            **self._counts(),
            **{f"{name}_s": seconds / spec.steps for name, seconds in self.phases.items()},
            "peak_rss_mb": _peak_mb(),
            **self.found,
        }

    def _counts(self) -> dict[str, float]:
        """Ratios of the first step that need no clock."""
        spec = self.spec
        real, responses = _tokens(spec.method, spec.batches()[0])
        counts = {"real_fraction": real / self.positions}
        if self._counter is None:
            return counts
        rows, online = self._counter.rows, spec.method in ONLINE
        passes, phase = (spec.shape.epochs, "update") if online else (1, "")
        counts["matmul_tokens_per_real_token"] = rows[phase, "first"] / real / passes
        if spec.method != "reward":
            counts["head_positions_per_response_token"] = rows[phase, "head"] / responses / passes
        if online:
            counts["decode_row_steps_per_token"] = rows["generation", "head"] / responses
        return counts


def _peak_mb() -> float:
    """Largest resident memory of this process so far, in MiB.

    Not ``ru_maxrss`` where it can be helped: a process that is spawned begins with its parent's.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(x.split()[1]) for x in status.read_text().splitlines() if x.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _tokens(method: str, rows: list[dict[str, list[int]]]) -> tuple[int, int]:
    """Tokens in these rows that a step has to read, and those of them that are responses."""
    pairs = [pair for row in rows for pair in sequences(method, row)]
    return sum(len(prompt) + len(response) for prompt, response in pairs), sum(len(response) for _, response in pairs)


def main() -> None:
    """``python -m benchmarks.measure SPEC SPAWNED RESULT``: one run of one side, its line written to the file RESULT."""
    spec, spawned, result = Spec(**json.loads(sys.argv[1])), float(sys.argv[2]), Path(sys.argv[3])
    os.environ["OMP_NUM_THREADS"] = str(spec.threads)
    import torch

    torch.set_num_threads(spec.threads)
    meter = Meter(spec, spawned)
    own = {"ppo": "trl-ppo", **dict.fromkeys(GROUPED, "trl-group")}  # methods whose TRL has a file of its own
    name = own.get(spec.method, spec.side) if spec.side.startswith("trl") else spec.side
    importlib.import_module(SIDES[name]).run(spec, meter)
    result.write_text(json.dumps(meter.result()))


if __name__ == "__main__":
    main()
