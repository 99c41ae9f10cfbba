"""metrics.csv in a run's folder."""

import csv
import warnings
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter


class RunMetrics(CSVLogger):
    """Lightning's CSV logger, which deletes the file of the run that it goes on with; this one goes on with the file."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder, name="", version="")

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            path = Path(self.log_dir, ExperimentWriter.NAME_METRICS_FILE)
            kept = path.read_text() if path.is_file() else ""
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*Previous log files in this directory will be deleted.*")
                writer = ExperimentWriter(log_dir=self.log_dir)
            if kept:
                path.write_text(kept)
                writer.metrics_keys = next(csv.reader(kept.splitlines()))
            self._experiment = writer
        return self._experiment
