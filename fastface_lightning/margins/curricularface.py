"""CurricularFace goes easy on hard negatives at first and stresses them as training succeeds."""

import math

import torch
from torch import Tensor

from .base import Margin, angle, update


class CurricularFace(Margin):
    r"""ArcFace, with the negatives that beat the target weighted by how far training has come.

    .. math::

        \cos'_y &= \begin{cases} \cos(\theta_y + m) & \cos_y > \cos(\pi - m) \\
            \cos_y - m \sin m & \text{else} \end{cases} \\
        n(\cos_j) &= \begin{cases} \cos_j\, (t + \cos_j) & \cos_j > \cos(\theta_y + m) \\
            \cos_j & \text{else} \end{cases} \\
        t &\leftarrow t + \alpha (\operatorname{mean}(\cos_y) - t)

    where :math:`\theta_y = \arccos(\cos_y)`. t starts at 0 and takes in the batch before it is
    used, in training only; a mean that is not finite leaves it as it was. No gradient passes
    through t or through the comparison of a negative with the target.

    The fallback beyond :math:`\pi - m` keeps the target falling with the angle, where
    ArcFace's rises again; it starts lower, by cos m + m sin m - 1 (0.12 for m = 0.5).

    Args:
        m: margin, radians, in [0, pi); with 0 the target is untouched and negatives above it are
            still reweighted.
        alpha: weight of the newest batch in t, in (0, 1].

    References:
        Huang et al., CurricularFace: Adaptive Curriculum Learning Loss for Deep Face Recognition,
        2020 (arXiv 2004.00288), sec. 3.2.
    """

    t: Tensor

    def __init__(self, m: float = 0.5, alpha: float = 0.01) -> None:
        super().__init__()
        if not 0 <= m < math.pi:
            raise ValueError(f"m must lie in [0, pi), got {m}")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must lie in (0, 1], got {alpha}")
        self.m, self.alpha = m, alpha
        self.register_buffer("t", torch.tensor(0.0))

    def forward(self, cos_y: Tensor, norm: Tensor, label: Tensor) -> Tensor:
        if self.training:
            update(self.t, cos_y.mean(), self.alpha)
        fallback = cos_y - self.m * math.sin(self.m)
        return torch.where(cos_y > math.cos(math.pi - self.m), self._add_margin(cos_y), fallback)

    def negatives(self, cos: Tensor, cos_y: Tensor, cos_y_prime: Tensor) -> Tensor:
        hard = cos > self._add_margin(cos_y.detach())[:, None]
        return torch.where(hard, cos * (self.t + cos), cos)

    def _add_margin(self, cos_y: Tensor) -> Tensor:
        return torch.cos(angle(cos_y) + self.m)
