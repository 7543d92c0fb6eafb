"""What a run says stands once on the console and once in its ``train.log``, without noise."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

LIGHTNING = ("lightning", "lightning.pytorch", "lightning.fabric")
# Of others, and of no use to somebody who trains faces.
NOISE = re.compile(
    r"(TPU|HPU|IPU) available|Tip: |litlogger|Loading `train_dataloader` to estimate|"
    r"`isinstance\(treespec|does not have many workers|weights_only|You are using a CUDA device|"
    r"is smaller than the logging interval|`Trainer.fit` stopped|Restoring states from the|"
    r"Restored all states|Missing logger folder|Experiment with name"
)


def is_useful(record: logging.LogRecord) -> bool:
    """Whether a message is none of the known noise of others."""
    of_others = record.name.startswith(("lightning", "pytorch_lightning", "py.warnings"))
    return not (of_others and NOISE.search(record.getMessage()))


@contextmanager
def quiet_console() -> Iterator[None]:
    """Within it messages and warnings go through the root logger alone, whose handlers a program
    has set up, and those in :data:`NOISE` nowhere."""
    own = {name: logging.getLogger(name).handlers[:] for name in LIGHTNING}
    handlers = logging.getLogger().handlers[:]
    form = warnings.formatwarning
    with warnings.catch_warnings():
        warnings.formatwarning = lambda message, *_: str(message)
        for name in LIGHTNING:
            logging.getLogger(name).handlers.clear()
        for handler in handlers:
            handler.addFilter(is_useful)
        warnings.filterwarnings("ignore", NOISE.pattern.join(("(?s).*(", ").*")))
        logging.captureWarnings(True)
        try:
            yield
        finally:
            logging.captureWarnings(False)
            warnings.formatwarning = form
            for handler in handlers:
                handler.removeFilter(is_useful)
            for name, before in own.items():
                logging.getLogger(name).handlers[:] = before


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with loss, learning rate and accuracy, for a console of 80 columns."""

    BAR_FORMAT = "{desc}{n_fmt}/{total_fmt} |{bar}| {remaining}, {rate_noinv_fmt}{postfix}"

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        shown: dict[str, Any] = {}
        metrics = trainer.progress_bar_metrics
        if "loss" in metrics:
            shown["loss"] = f"{metrics['loss']:.2f}"
        shown["lr"] = f"{float(trainer.optimizers[0].param_groups[0]['lr']):.2g}"
        if "verify/accuracy" in trainer.callback_metrics:
            shown["acc"] = f"{trainer.callback_metrics['verify/accuracy']:.1%}"
        return shown
