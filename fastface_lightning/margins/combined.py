"""One formula holds the margins of SphereFace, ArcFace and CosFace, and every blend of them."""

import math

import torch
from torch import Tensor

from .base import Margin, angle


class Combined(Margin):
    r"""Multiply the angle by m1, add m2 to it, and subtract m3 from its cosine.

    .. math::

        \cos'_y = \cos(m_1 \theta_y + m_2) - m_3, \qquad \theta_y = \arccos(\cos_y)

    (1, m, 0) is ArcFace and (1, 0, m) CosFace; the gradient is the exact one. The formula holds for
    every angle: beyond :math:`\theta_y = (\pi - m_2) / m_1` it rises again, where SphereFace's own
    piecewise function goes on falling, so keep m1 near 1.

    Args:
        m1: factor on the angle, positive and finite.
        m2: margin on the angle, radians, in [0, pi).
        m3: margin on the cosine, cosine units, in [0, 2).

    References:
        Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, 2019
        (arXiv 1801.07698), eq. 4.
    """

    def __init__(self, m1: float = 1.0, m2: float = 0.0, m3: float = 0.4) -> None:
        super().__init__()
        if not 0 < m1 < math.inf:
            raise ValueError(f"m1 must be positive and finite, got {m1}")
        if not 0 <= m2 < math.pi:
            raise ValueError(f"m2 must lie in [0, pi), got {m2}")
        if not 0 <= m3 < 2:
            raise ValueError(f"m3 must lie in [0, 2), got {m3}")
        self.m1, self.m2, self.m3 = m1, m2, m3

    def forward(self, cos_y: Tensor, norm: Tensor, label: Tensor) -> Tensor:
        return torch.cos(self.m1 * angle(cos_y) + self.m2) - self.m3
