"""Lightning's CSV logger, whose ``metrics.csv`` goes on where a resumed run goes on."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger


class ResumableCSVLogger(CSVLogger):
    """Writes ``metrics.csv`` into a folder, after the rows of the run's earlier part.

    Args:
        save_dir: folder of ``metrics.csv``.
        resume_step: optimizer step the run resumes from; earlier rows stay, later ones go.
    """

    def __init__(self, save_dir: str | Path, resume_step: int = 0) -> None:
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=1)
        self.resume_step = resume_step

    @property
    def experiment(self) -> Any:
        if self._experiment is not None:
            return super().experiment
        kept = self._earlier_rows()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Experiment logs directory")
            writer = super().experiment
        if kept:
            writer.metrics = kept
            writer.save()
        return writer

    def _earlier_rows(self) -> list[dict[str, str]]:
        file = Path(self.log_dir) / "metrics.csv"
        if not file.is_file():
            return []
        with file.open(newline="") as lines:
            return [
                {name: value for name, value in row.items() if value}
                for row in csv.DictReader(lines)
                if float(row["step"]) < self.resume_step
            ]
