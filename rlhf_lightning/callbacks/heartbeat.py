"""A host that is gone is noticed within a minute, however long the ranks may keep each other waiting."""

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf_lightning.errors import UserError

EVERY = 5.0  # seconds
FINISHED = 1 << 40  # more beats than any run has
GONE = re.compile(r"Connection (closed|reset) by peer.*|Broken pipe.*|remote process exited.*")  # gloo, gloo, NCCL
HOW_TO_GO_ON = "go on with the same command and --ckpt_path last"


class Heartbeat(Callback):
    """Ends this process once another rank has not been heard from for a while.

    A collective can't tell a rank that is gone from one that generates long responses or waits for a slow reward, and
    waits for either until its timeout of half an hour. So a thread of each rank counts in the store where the ranks have
    met, whatever the rank computes: the first listens to all, the others to the first, and to what it has to say of them.
    """

    def __init__(self, limit: float | None = 40.0) -> None:
        """Set the time.

        Args:
            limit: Seconds without a sign of life after which a rank counts as gone. More for rewards whose code keeps
                Python's other threads from running for so long. None: a collective's timeout ends the run.

        Raises:
            UserError: If it is too short for a beat to be late.
        """
        if limit is not None and limit < 2 * EVERY:
            raise UserError(
                f"heartbeat.limit is {limit:g} s; a rank beats every {EVERY:g}, give at least {2 * EVERY:g}"
            )
        self.limit = limit
        self._over, self._finished = threading.Event(), False
        self._threads: list[threading.Thread] = []
        self._heard: dict[int, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.limit is None or not dist.is_initialized() or trainer.world_size == 1 or self._threads:
            return
        rank, others = trainer.global_rank, range(1, trainer.world_size) if trainer.is_global_zero else [0]
        met: Any = dist.distributed_c10d._get_default_store()
        store = met.clone()  # one connection a thread
        store.set(f"heartbeat/host/{rank}", socket.gethostname())
        trainer.strategy.barrier("heartbeat")
        hosts = {other: store.get(f"heartbeat/host/{other}").decode() for other in others}
        self._over.clear()
        self._finished = False
        self._heard = dict.fromkeys(others, time.monotonic())
        self._threads = [
            threading.Thread(target=self._beat, args=(store, rank), daemon=True, name="heartbeat"),
            threading.Thread(target=self._listen, args=(met.clone(), hosts), daemon=True, name="heartbeat listener"),
        ]
        for thread in self._threads:
            thread.start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._finished = True
        self._over.set()
        for thread in self._threads:
            thread.join(EVERY)
        self._threads = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._over.set()  # the others may well be waiting for this rank, and are to notice

    def _beat(self, store: Any, rank: int) -> None:
        """Count, and look how far the others have; any of this may block for ever once the store's host is gone."""
        counts = dict.fromkeys(self._heard, -1)
        while not self._over.is_set():
            with suppress(RuntimeError):  # the connection is gone: that nothing is heard any more will tell
                store.add(f"heartbeat/{rank}", 1)
                for other, before in counts.items():
                    counts[other] = store.add(f"heartbeat/{other}", 0)
                    if counts[other] != before or before >= FINISHED:
                        self._heard[other] = time.monotonic()
                if (lost := store.add("heartbeat/lost", 0)) > 0:
                    leave(f"rank {lost - 1} has not been heard from by the first")
            self._over.wait(EVERY)
        if self._finished:
            with suppress(RuntimeError):
                store.add(f"heartbeat/{rank}", FINISHED)

    def _listen(self, store: Any, hosts: dict[int, str]) -> None:
        """Look at the clock, and at nothing that could block."""
        assert self.limit is not None
        while not self._over.wait(1.0):
            lost, heard = min(self._heard.items(), key=lambda item: item[1])
            if time.monotonic() - heard > self.limit:
                tell = threading.Thread(target=store.add, args=("heartbeat/lost", lost + 1), daemon=True)
                tell.start()  # the store may be what is gone
                tell.join(1.0)
                leave(f"rank {lost} on host {hosts[lost]} has not been heard from for {self.limit:g} s")


def leave(what: str) -> NoReturn:
    """End this process, from a thread: the main one may be in a collective that will not return."""
    print(f"error: {what}: its process, its host or the network is gone; {HOW_TO_GO_ON}", file=sys.stderr, flush=True)
    os._exit(2)


@contextmanager
def lost_ranks() -> Iterator[None]:
    """Around what trains: where a collective finds the other end closed, say so instead of where in it.

    Raises:
        UserError: If so.
    """
    try:
        yield
    except RuntimeError as error:
        gone = GONE.search(str(error))
        if gone is None or not ("gloo" in str(error) or isinstance(error, dist.DistError)):
            raise
        raise UserError(
            f"a rank that this one waits for is gone ({gone[0]}); why, its own output says; {HOW_TO_GO_ON}"
        ) from error
