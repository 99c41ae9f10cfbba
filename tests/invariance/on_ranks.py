"""One process of a distributed run: subjects under DDP or FSDP2 over gloo; the tests start it, once a rank.

``LOCAL_RANK=R python -m tests.invariance.on_ranks FOLDER STRATEGY SUBJECT...`` reads the scalar models ``FOLDER/ARCHITECTURE``
and writes ``FOLDER/STRATEGY-R.pt``: the traces by subject, then by architecture and layout.
"""

import os
import sys
from pathlib import Path

import torch

from tests.invariance.rearrangements import PLAIN, Arrangement
from tests.invariance.subjects import ARCHITECTURES, SUBJECTS, run

# Of the eleven rows, two steps, each rank has four, then two and one: in forwards of a single row, one rank has one more.
SHARED: dict[str, Arrangement] = {"whole": PLAIN, "micro-batches of one": Arrangement(micro=1)}


def main(folder: Path, strategy: str, subjects: list[str]) -> None:
    torch.set_num_threads(1)
    rank, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    traces = {
        subject: {
            (architecture, layout): run(
                SUBJECTS[subject], architecture, str(folder / architecture), arrangement, world, rank, strategy
            )
            for architecture in ARCHITECTURES
            for layout, arrangement in SHARED.items()
            if SUBJECTS[subject].takes(arrangement)
        }
        for subject in subjects
    }
    torch.save(traces, folder / f"{strategy}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
