"""A running average over batches that one bad batch cannot spoil."""

import torch
from torch import Tensor


@torch.no_grad()
def update(running: Tensor, batch: Tensor, alpha: float) -> None:
    r"""Move an exponential moving average towards a batch's value, in place.

    .. math:: r \leftarrow r + \alpha (b - r)

    A value that is not finite leaves the average as it is; that is decided on the device, so
    nothing waits for it.

    Args:
        running: r, the average, scalar float.
        batch: b, the value of the batch, scalar float.
        alpha: weight of the batch, in (0, 1].
    """
    step = alpha * (batch - running)
    running += torch.where(step.isfinite(), step, 0)
