"""``python -m rlhf_lightning``."""

import os

# Before torch loads OpenMP: threads that wait without spinning. On a machine that does something else as well, spinning
# made training more than twice as slow.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from rlhf_lightning.cli import main

if __name__ == "__main__":
    main()
