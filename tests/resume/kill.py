"""Kills runs at random moments and holds what comes out against the run that nobody killed.

    python -m tests.resume.kill --kills 20             twenty kills of each method
    python -m tests.resume.kill --kills 10 --ranks 2   ten kills in all, of runs on two ranks (DDP over gloo)

Each kill: start the run in a fresh process, SIGKILL it at a moment drawn uniformly from the length of an uninterrupted run
(start-up, rollouts, updates, validations, checkpoints and the export are all in it), go on with `--ckpt_path last` where there
is a checkpoint and begin again where there is none, perhaps kill that too, and let it end. Then metrics.csv, the exported
weights and everything in the last checkpoint must be the same, bit for bit.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.resume.runs import METHODS, SAMPLING, Crew, differences

AGAIN = 0.4  # how often a run that goes on is killed as well
SLOW = SAMPLING  # an epoch of these is as long as two of the others


class Whole(NamedTuple):
    """An uninterrupted run, and how long one takes."""

    folder: Path
    seconds: float


def longer(method: str) -> tuple[str, str]:
    """What is added to the command line, so that most of a run is training."""
    return "--trainer.max_epochs", "4" if method in SLOW else "8"


def uninterrupted(crew: Crew, method: str, ranks: int) -> Whole:
    """Run twice: the first fills the cache of tokenized rows, the second is timed, and both must be equal."""
    first = crew.finish(method, f"{method}-first", *longer(method), ranks=ranks)
    started = time.monotonic()
    second = crew.finish(method, f"{method}-second", *longer(method), ranks=ranks)
    if found := differences(first, second):
        raise RuntimeError(f"two uninterrupted runs of {method} differ in {found}")
    return Whole(second, time.monotonic() - started)


def kill(crew: Crew, method: str, number: int, whole: Whole, ranks: int, seed: int) -> bool:
    """One kill, told in one line; True if nothing shows of it."""
    name, draw, moments = f"{method}-{number}", random.Random(f"{seed} {method} {number}"), []
    run, folder = crew.run(method, name, *longer(method), ranks=ranks)
    while True:
        moment = draw.random() * whole.seconds
        time.sleep(max(run.started + moment - time.monotonic(), 0))
        phase = run.kill()
        if phase == "over":  # it was faster than the one that was timed
            if moments:
                break
            run = crew.run(method, name, *longer(method), "--overwrite", "true", ranks=ranks)[0]
            continue
        moments.append(f"{moment:5.2f} s ({phase})")
        run = crew.go_on(method, name, *longer(method), ranks=ranks)
        if draw.random() >= AGAIN:
            break
    codes = run.join()
    found = differences(whole.folder, folder) if codes == [0] * ranks else [f"exit codes {codes}, {run.log}"]
    print(
        f"{method:<7} {number:>3}  killed at {', '.join(moments)}: {f'DIFFERENT {found}' if found else 'equal'}",
        flush=True,
    )
    if not found:
        shutil.rmtree(folder)
    return not found


def main() -> None:
    """Exit code 0 if every run was equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each method; on several ranks, of all together")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    options = parser.parse_args()
    jobs = max(options.jobs // options.ranks, 1)
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    crew = Crew(folder)
    wholes = {method: uninterrupted(crew, method, options.ranks) for method in options.methods}
    for method, whole in wholes.items():
        print(f"{method:<7} uninterrupted: {whole.seconds:.2f} s, twice, equal", flush=True)
    methods = list(options.methods)
    plan = [(method, number) for number in range(options.kills) for method in methods]
    plan = plan[: options.kills] if options.ranks > 1 else plan
    with ThreadPoolExecutor(jobs) as pool:
        equal = list(pool.map(lambda job: kill(crew, *job, wholes[job[0]], options.ranks, options.seed), plan))
    print(f"{sum(equal)} of {len(equal)} equal, {time.monotonic() - started:.0f} s")
    if all(equal):
        shutil.rmtree(folder)
    sys.exit(not all(equal))


if __name__ == "__main__":
    main()
