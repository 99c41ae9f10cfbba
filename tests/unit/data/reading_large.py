"""A process that reads a file as a run does, and says how much memory it took: ``python reading_large.py FILE TOKENIZER``.

What counts is anonymous memory. Mapped files are in the kernel's cache: they show in ``ru_maxrss`` as long as nobody else wants
the memory, however small the part that is in use.
"""

import json
import sys
import threading
import time
from pathlib import Path

from rlhf_lightning.data.demonstrations import DemonstrationDataModule
from rlhf_lightning.data.splits import Split
from rlhf_lightning.data.streams import StreamSource


def anonymous() -> int:
    """Bytes that the process holds and no file does."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """Looks every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.over = 0, False

    def run(self) -> None:
        while not self.over:
            self.most = max(self.most, anonymous())
            time.sleep(0.005)


def main(file: str, tokenizer: str, stream: bool) -> None:
    before, peak, started = anonymous(), Peak(), time.perf_counter()
    peak.start()
    data = DemonstrationDataModule(
        StreamSource(file, window_rows=4096) if stream else file, tokenizer, split=Split(0.0 if stream else 0.05)
    )
    data.setup("test")
    seconds = {"setup": time.perf_counter() - started}
    rows = sum(len(batch.input_ids) for batch in data.train_dataloader())
    seconds["epoch"] = time.perf_counter() - started - seconds["setup"]
    peak.over = True
    held = len(data.rows["validation"]) if "validation" in data.rows else 0
    print(json.dumps({"mib": (peak.most - before) / 2**20, "rows": rows + held, "seconds": seconds}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:] == ["stream"])
