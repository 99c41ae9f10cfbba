"""Judges answers with reasoning-gym, a line of JSON for each, each in a process that ends with it."""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import reasoning_gym

from rlhf_lightning.rewards.inside.plain import quiet

LONGEST = 60  # seconds; less is seen to from outside


@cache
def task(name: str, config: str) -> Any:
    """The task's data and verifier, from the seed that made the prompt."""
    return reasoning_gym.create_dataset(name, **json.loads(config))


def in_child(verdict: Callable[[], float]) -> float:
    """What a child process finds, which can start no other; 0 if it finds nothing."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        quiet(0, 1)
        signal.alarm(LONGEST)
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        try:
            os.write(writer, str(float(verdict())).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        found = pipe.read(64)
    os.waitpid(child, 0)
    return min(max(float(found), 0.0), 1.0) if found else 0.0


def main(order: dict[str, Any]) -> None:
    """Answer until the input ends."""
    for line in sys.stdin:
        question = json.loads(line)
        mark = json.loads(question["mark"])
        made = task(mark["task"], json.dumps(mark["config"]))
        entry, answer = made[mark["index"]], question["answer"]
        print(json.dumps(in_child(lambda: made.score_answer(answer, entry))), flush=True)  # noqa: B023  (called at once)
