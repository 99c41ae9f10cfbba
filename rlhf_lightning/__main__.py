"""``python -m rlhf_lightning``."""

from rlhf_lightning.cli import main

if __name__ == "__main__":
    main()
