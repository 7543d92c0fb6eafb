"""A data set whose pixels say which image they are of."""

from typing import Any

import numpy as np

from fastface_lightning.data import FaceDataset


class Pixels(FaceDataset):
    """Image i is everywhere i modulo 256, and shows the i-th label's identity."""

    def __init__(self, labels: Any) -> None:
        super().__init__(size=1, max_bad=1)
        labels = np.asarray(labels, dtype=np.int32)
        self._hold([str(i) for i in range(labels.max() + 1)], labels)
        self.broken: int | None = None

    def _fetch(self, index: int) -> bytes:
        return bytes([index % 256])

    def read_into(self, index: int, out: np.ndarray) -> None:
        if index == self.broken:
            raise ValueError("broken")
        out[:] = index % 256

    def name(self, index: int) -> str:
        return str(index)

    def __str__(self) -> str:
        return "pixels"
