"""ElasticFace samples a new margin for every image, so that no one distance fits all people."""

import math
from typing import Literal

import torch
from torch import Tensor

from .base import Margin, angle


class ElasticFace(Margin):
    r"""ArcFace or CosFace with a margin sampled from a normal distribution.

    .. math::

        \cos'_y = \begin{cases} \cos(\theta_y + m_i) & \text{arc} \\
            \cos_y - m_i & \text{cos} \end{cases}, \qquad
        m_i \sim \mathcal{N}(m, \text{std}^2)

    where :math:`\theta_y = \arccos(\cos_y)` and :math:`m_i` is sampled for each image at each
    training forward by torch's default generator, so ``torch.manual_seed`` repeats it. In eval it
    is m.

    Args:
        m: mean of the margin: radians in [0, pi) for ``arc``, cosine units in [0, 2) for ``cos``.
        std: standard deviation of the margin, in the units of ``m``, at least 0.
        kind: ``arc`` adds the margin to the angle, ``cos`` subtracts it from the cosine.

    References:
        Boutros et al., ElasticFace: Elastic Margin Loss for Deep Face Recognition, 2022
        (arXiv 2109.09416), sec. III.
    """

    def __init__(
        self, m: float = 0.5, std: float = 0.05, kind: Literal["arc", "cos"] = "arc"
    ) -> None:
        super().__init__()
        if kind not in ("arc", "cos"):
            raise ValueError(f"kind must be 'arc' or 'cos', got {kind!r}")
        if kind == "arc" and not 0 <= m < math.pi:
            raise ValueError(f"m must lie in [0, pi), got {m}")
        if kind == "cos" and not 0 <= m < 2:
            raise ValueError(f"m must lie in [0, 2), got {m}")
        if not 0 <= std < math.inf:
            raise ValueError(f"std must be at least 0 and finite, got {std}")
        self.m, self.std, self.kind = m, std, kind

    def forward(self, cos_y: Tensor, norm: Tensor, label: Tensor) -> Tensor:
        m_i = self.m + self.std * torch.randn_like(cos_y) if self.training else self.m
        return torch.cos(angle(cos_y) + m_i) if self.kind == "arc" else cos_y - m_i
