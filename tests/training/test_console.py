"""What a run says on its console."""

import io

import pytest
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from fastface_lightning.training.console import ProgressBar


@pytest.mark.parametrize("total", [25, 99_375])
def test_the_progress_bar_fits_a_console(total: int) -> None:
    file = io.StringIO()
    bar = Tqdm(total=total, ncols=80, file=file, bar_format=ProgressBar.BAR_FORMAT)
    bar.set_description("Epoch 12")
    bar.set_postfix({"loss": "10.26", "lr": "0.02", "acc": "90.6%"})
    bar.n, bar.start_t = total // 2, bar.start_t - total / 4
    bar.refresh()
    line = file.getvalue().split("\r")[-1].rstrip()
    assert len(line) <= 80
    assert line.startswith("Epoch 12: ") and ": :" not in line and "acc=90.6%" in line
