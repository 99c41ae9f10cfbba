"""Many samples at once: in threads that wait for processes, with a bar when it takes long and a time limit each."""

import json
import os
import queue
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

from tqdm import tqdm

from rlhf_lightning.rewards.sandbox import Sandbox
from rlhf_lightning.rewards.sandbox_process import Running

Item = TypeVar("Item")
Answer = TypeVar("Answer")
SHOWN_AFTER = 2.0  # seconds: a bar for what takes longer


def processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_parallel(
    function: Callable[[Item], Answer], items: Sequence[Item], title: str, workers: int | None = None
) -> list[Answer]:
    """``function`` of each item, in order; what it raises ends the whole.

    Args:
        function: Waits for something that is not Python's own work.
        items: What it is given.
        title: Before the bar, which is shown on a terminal only.
        workers: Calls at a time; as many as there are processors if not given.
    """
    with (
        ThreadPoolExecutor(workers or processors(), thread_name_prefix=title) as pool,
        tqdm(total=len(items), desc=title, delay=SHOWN_AFTER, leave=False, disable=None) as bar,
    ):
        futures = [pool.submit(function, item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        finally:
            for future in futures:
                future.cancel()
        return [future.result() for future in futures]


class Workers:
    """Processes that answer a line of JSON with a line of JSON, and live from one call to the next.

    One that takes longer than it may, or dies, is killed and another one started for the next question.
    """

    def __init__(self, sandbox: Sandbox, role: str, order: dict[str, Any], seconds: float) -> None:
        """Remember how they are started.

        Args:
            sandbox: Where they run.
            role: Module of ``inside``.
            order: What each is told at its start.
            seconds: For each answer.
        """
        self.sandbox, self.role, self.order, self.seconds = sandbox, role, order, seconds
        self._idle: queue.SimpleQueue[Running] = queue.SimpleQueue()
        weakref.finalize(self, _end, self._idle)

    def ask(self, question: Any) -> Any:
        """The answer, or None if there was none in time."""
        worker = self._worker()
        try:
            assert worker.process.stdin is not None
            worker.process.stdin.write(json.dumps(question).encode() + b"\n")
            worker.process.stdin.flush()
            line, end = b"", time.monotonic() + self.seconds
            while not line.endswith(b"\n"):
                piece = worker.piece(end, 1 << 16)
                if not piece:
                    break
                line += piece
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            worker.__exit__(None, None, None)
            return None
        self._idle.put(worker)
        return json.loads(line)

    def _worker(self) -> Running:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            return self.sandbox.start(self.role, dict(self.order), stdin=None, tied=False)


def _end(idle: "queue.SimpleQueue[Running]") -> None:
    while not idle.empty():
        idle.get().__exit__(None, None, None)
