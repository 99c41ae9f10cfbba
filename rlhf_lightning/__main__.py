"""``python -m rlhf_lightning``."""

import sys

from rlhf_lightning.commands.early import answered
from rlhf_lightning.errors import reported


def main() -> None:
    """Entry point: answer what needs no torch and no Lightning, and import them only for the rest."""
    args = sys.argv[1:]
    with reported():
        if answered(args):
            return
    from rlhf_lightning.cli import run

    run(args)


if __name__ == "__main__":
    main()
