"""A function on several ranks over gloo, each in a process that has imported everything already."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(function: Callable[..., Any], folder: Path, *args: Any, ranks: int = 2, timeout: float = 120) -> list[Any]:
    """What ``function(rank, *args)`` returns on each rank.

    Args:
        function: At the top of a module.
        folder: An empty one, for the ranks to meet in.
        args: Plain data.
        ranks: How many.
        timeout: Seconds until those that wait for each other are given up.

    Raises:
        AssertionError: With the traceback, if a rank fails.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.gloo_preloaded"])
    folder.mkdir(parents=True, exist_ok=True)
    processes = [context.Process(target=rank_of, args=(r, ranks, folder, function, args)) for r in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks) if rank not in hung]
    assert not hung, f"ranks {hung} hang; the others: {results}"
    failures = [failure for failure, _ in results if failure is not None]
    assert not failures, "\n".join(failures)
    return [value for _, value in results]


def rank_of(rank: int, ranks: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """What a process does."""
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    try:
        result = (None, function(rank, *args))
    except BaseException:
        result = (traceback.format_exc(), None)
        raise
    finally:
        torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()
