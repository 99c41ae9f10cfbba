"""Prints the first step of every method in every accepted precision at learning rate 0: ``python -m tests.precision.table``."""

import logging
import tempfile
import warnings
from pathlib import Path

from tests.precision.methods import METHODS, PRECISIONS, first_step

COLUMNS = {
    "loss": ("loss", "policy_loss", "loss/policy_avg"),
    "ratio": ("val/ratio",),
    "clip fraction": ("policy/clipfrac_avg", "clip_ratio/region_mean"),
    "approx. KL": ("policy/approxkl_avg",),
    "KL to reference": ("objective/kl", "kl"),
    "sampler off by": ("sampling/sampling_logp_difference/max",),
}


def line(logged: dict[str, float]) -> list[str]:
    """The columns of one run; a dash where a method has no such number."""
    found = [next((logged[name] for name in names if name in logged), None) for names in COLUMNS.values()]
    return ["-" if value is None else f"{value:.7g}" for value in found]


def main() -> None:
    """Run and print."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "rlhf_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    print("| method | precision |", " | ".join(COLUMNS), "|")
    print("|" + " --- |" * (2 + len(COLUMNS)))
    with tempfile.TemporaryDirectory() as folder:
        for name in METHODS:
            for precision in PRECISIONS:
                print(
                    "|",
                    " | ".join([name, str(precision), *line(first_step(name, precision, Path(folder)))]),
                    "|",
                    flush=True,
                )


if __name__ == "__main__":
    main()
