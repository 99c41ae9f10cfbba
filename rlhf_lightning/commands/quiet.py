"""Our own messages, and of the libraries' only what someone should act on: for the command line and for notebooks."""

import logging
import warnings

import datasets
import transformers

from rlhf_lightning.errors import harmless

IGNORED = (
    ".*LightningCLI's args parameter.*",  # argv stays as it is: DDP starts its ranks from it
    ".*sync_dist=True.*",  # what we log has been summed over ranks already
    ".*does not have many workers.*",
    ".*`training_step` returned `None`.*",  # PPO steps its optimizer itself
    ".*treespec, LeafSpec.*",
    ".*smaller than the logging interval.*",
    "IProgress not found.*",
    ".*have no logger configured.*",  # validate, test and predict print
    ".*Found .* in eval mode at the start of training.*",  # metrics
    ".*Checkpoint directory .* exists and is not empty.*",  # where a run goes on
    ".*custom batch sampler.*for prediction.*",
)


class HarmlessFormatter(logging.Formatter):
    """A message may quote data, and data must not command the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))


def be_quiet(progress_bars: bool = True) -> None:
    """Show our log from INFO on, the libraries' from WARNING on, and none of the warnings that ask for nothing.

    Args:
        progress_bars: False also hides the bars of datasets.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(HarmlessFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("rlhf_lightning").setLevel(logging.INFO)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # the report of trainer.profiler
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not progress_bars:
        datasets.disable_progress_bars()
    for message in IGNORED:
        warnings.filterwarnings("ignore", message)
