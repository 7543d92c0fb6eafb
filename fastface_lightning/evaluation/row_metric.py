"""A torchmetrics Metric of rows that come in batches, on any processes, put back in their order."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from .checks import check_column

_UNNUMBERED = -1


class RowMetric(Metric):
    """Keeps the rows of every ``update``; a subclass says what all of them come to.

    On one process the rows stand in the order of the updates. Where a sampler spreads them over
    processes, give each row's number in the whole set as ``index``: the rows are then sorted by it,
    and the repetitions by which a distributed sampler fills its last batch are dropped. Every
    process must update at least once; an empty batch will do. Call ``update`` with each batch
    rather than the metric itself: a batch alone has no value.

    Args:
        kwargs: passed on to :class:`torchmetrics.Metric`.

    Attributes:
        columns: names of the states, each a list of (n, ...) tensors, one a batch.
        result: what the last ``compute()`` found, None before.

    Raises:
        ValueError: an ``index`` of another shape or dtype, or that came with some updates only.
    """

    is_differentiable = False
    full_state_update = False

    columns: ClassVar[tuple[str, ...]]
    index: list[Tensor]
    result: Any = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in (*self.columns, "index"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def keep(self, index: Tensor | None, *columns: Tensor) -> None:
        """Add n rows, one tensor for each of ``columns``."""
        n = len(columns[0])
        if index is None:
            index = torch.full((n,), _UNNUMBERED, device=columns[0].device)
        check_column(index, "index", n, torch.int64)
        for name, column in zip((*self.columns, "index"), (*columns, index), strict=True):
            getattr(self, name).append(column.detach())

    def rows(self) -> tuple[Tensor, ...]:
        """All rows of each of ``columns``, in order of their index, each once."""
        index = dim_zero_cat(self.index)
        columns = tuple(dim_zero_cat(getattr(self, name)) for name in self.columns)
        numbered = int((index != _UNNUMBERED).sum())
        if numbered == 0:
            return columns
        if numbered < len(index):
            raise ValueError(
                "index must come with every update or with none, "
                f"got it for {numbered} of {len(index)} rows"
            )
        index, order = index.sort(stable=True)
        is_new = torch.ones_like(index, dtype=torch.bool)
        is_new[1:] = index[1:] != index[:-1]
        return tuple(column[order[is_new]] for column in columns)

    def reset(self) -> None:
        super().reset()
        self.result = None
