"""ArcFace asks the embedding to be closer to its class centre by a fixed angle."""

import math

import torch
from torch import Tensor

from .base import Margin, angle


class ArcFace(Margin):
    r"""Add a constant to the angle between the embedding and its class centre.

    .. math::

        \cos'_y = \cos(\theta_y + m), \qquad \theta_y = \arccos(\cos_y), \qquad
        \frac{d\cos'_y}{d\cos_y} = \frac{\sin(\theta_y + m)}{\sin\theta_y}

    The formula is used at every angle, as in InsightFace's code. Beyond
    :math:`\theta_y = \pi - m`, a cosine below -0.88 for m = 0.5, it rises again: the derivative is
    negative there and the loss pushes the sample away from its centre. Embeddings start near
    cosine 0 and do not come that far; with ``straight_through`` the derivative is 1 even there.

    Args:
        m: margin, radians, in [0, pi).
        straight_through: take the derivative above as 1, which is what InsightFace's code trains
            with (its margin runs without gradient); the value is the same.

    References:
        Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, 2019
        (arXiv 1801.07698), eq. 3.
    """

    def __init__(self, m: float = 0.5, straight_through: bool = False) -> None:
        super().__init__()
        if not 0 <= m < math.pi:
            raise ValueError(f"m must lie in [0, pi), got {m}")
        self.m = m
        self.straight_through = straight_through

    def forward(self, cos_y: Tensor, norm: Tensor, label: Tensor) -> Tensor:
        cos_y_prime = torch.cos(angle(cos_y) + self.m)
        if self.straight_through:
            return cos_y + (cos_y_prime - cos_y).detach()
        return cos_y_prime
