"""SIGTERM: what Slurm and the owners of spot machines send before they take the machine away."""

import signal
import threading
from types import FrameType

from lightning.pytorch import Trainer


class Termination:
    """Notes a SIGTERM and does nothing else; whoever trains looks at it between two batches.

    Lightning's own handler would broadcast to the other ranks from inside of the handler, between whatever collectives they
    are in, and end the run without a checkpoint.

    Attributes:
        requested: Whether this process was asked to end.
        agreed: Whether all ranks know.
    """

    def __init__(self) -> None:
        self.requested = self.agreed = False

    def watch(self, trainer: Trainer) -> None:
        """Take over from Lightning's handler, which puts back the one before it when the trainer is done."""
        connector = trainer._signal_connector
        self.requested, connector.received_sigterm = self.requested or connector.received_sigterm, False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
