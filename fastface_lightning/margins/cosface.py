"""CosFace asks the target cosine to win by a fixed amount."""

from torch import Tensor

from .base import Margin


class CosFace(Margin):
    r"""Subtract a constant from the target cosine.

    .. math:: \cos'_y = \cos_y - m

    Args:
        m: margin, cosine units, in [0, 2).

    References:
        Wang et al., CosFace: Large Margin Cosine Loss for Deep Face Recognition, 2018
        (arXiv 1801.09414), eq. 4.
    """

    def __init__(self, m: float = 0.4) -> None:
        super().__init__()
        if not 0 <= m < 2:
            raise ValueError(f"m must lie in [0, 2), got {m}")
        self.m = m

    def forward(self, cos_y: Tensor, norm: Tensor, label: Tensor) -> Tensor:
        return cos_y - self.m
