"""AdaFace asks most of the faces it sees well, by the length of their embeddings."""

import math

import torch
from torch import Tensor

from .base import Margin, angle, update

EPS = 1e-3


class AdaFace(Margin):
    r"""Shift the margin from the angle to the cosine as the norm of the embedding grows.

    .. math::

        \cos'_y = \cos(\theta_y - m z) - (m + m z), \qquad
        z = \operatorname{clip}\!\left(\frac{a - \mu}{\sigma + \epsilon} h, -1, 1\right)

    where :math:`\theta_y = \arccos(\cos_y)`, :math:`a` is the norm of the embedding within
    [0.001, 100], :math:`\epsilon` = 0.001, and :math:`\mu` and :math:`\sigma` are exponential
    moving averages of the batch's mean and standard deviation of :math:`a`, starting at 20 and 100:

    .. math:: \mu \leftarrow \mu + \alpha (\operatorname{mean}(a) - \mu), \qquad
        \sigma \leftarrow \sigma + \alpha (\operatorname{std}(a) - \sigma)

    They take in the batch before they are used, in training only. At z = -1, a poor image, this is
    ArcFace; at 0 it is CosFace; at 1, a good one, an ArcFace of negative angle less 2 m. As in the
    authors' release the target cosine is kept within 1 - :math:`\epsilon` and the shifted angle
    :math:`\epsilon` inside of 0 and pi, with no gradient beyond, and none reaches the norm.

    A batch whose statistic is not finite leaves it as it was; so does the deviation of one sample.

    Args:
        m: margin, radians on the angle and cosine units, in [0, 1).
        h: z of a norm one deviation above the mean, at least 0; 0 is CosFace.
        alpha: weight of the newest batch in the running statistics, in (0, 1].

    References:
        Kim et al., AdaFace: Quality Adaptive Margin for Face Recognition, 2022
        (arXiv 2204.00964), sec. 3.3.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, m: float = 0.4, h: float = 0.333, alpha: float = 0.01) -> None:
        super().__init__()
        if not 0 <= m < 1:
            raise ValueError(f"m must lie in [0, 1), got {m}")
        if not 0 <= h < math.inf:
            raise ValueError(f"h must be at least 0 and finite, got {h}")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must lie in (0, 1], got {alpha}")
        self.m, self.h, self.alpha = m, h, alpha
        self.register_buffer("mean", torch.tensor(20.0))
        self.register_buffer("std", torch.tensor(100.0))

    def forward(self, cos_y: Tensor, norm: Tensor, label: Tensor) -> Tensor:
        a = norm.detach().clamp(1e-3, 100)
        if self.training:
            update(self.mean, a.mean(), self.alpha)
            if len(a) > 1:
                update(self.std, a.std(), self.alpha)
        z = ((a - self.mean) / (self.std + EPS) * self.h).clamp(-1, 1).to(cos_y.dtype)
        theta_m = angle(cos_y.clamp(-1 + EPS, 1 - EPS)) - self.m * z
        return torch.cos(theta_m.clamp(EPS, math.pi - EPS)) - (self.m + self.m * z)
