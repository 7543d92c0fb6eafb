"""MagFace lets the length of an embedding tell how good its image is."""

import math

import torch
from torch import Tensor

from .base import Margin, angle


class MagFace(Margin):
    r"""Widen ArcFace's angle with the norm of the embedding, and reward a large norm.

    .. math::

        \cos'_y &= \begin{cases} \cos(\theta_y + m(a)) & \cos_y > 0 \\ \cos_y & \text{else}
            \end{cases} \\
        m(a) &= l_m + \frac{u_m - l_m}{u_a - l_a} (a - l_a) \\
        \lambda_g\, g(a) &= \lambda_g \left(\frac{a}{u_a^2} + \frac{1}{a}\right)

    where :math:`\theta_y = \arccos(\cos_y)` and :math:`a` is the norm of the embedding within
    :math:`[l_a, u_a]`. The penalty falls as the norm grows and is flat at :math:`u_a`; the margin
    grows with it, so only an embedding near its centre can afford to be long. Both pull on the norm
    by their gradient, inside of :math:`[l_a, u_a]` only.

    There is no margin beyond 90 degrees (the release's easy margin); the target jumps by sin m(a)
    there.

    Args:
        l_a: norm at and below which the margin is smallest, positive.
        u_a: norm at and above which it is largest, above ``l_a``.
        l_m: smallest margin, radians, in [0, pi).
        u_m: largest margin, radians, in [``l_m``, pi).
        lambda_g: weight of the penalty, in units of the loss times the norm, at least 0.

    References:
        Meng et al., MagFace: A Universal Representation for Face Recognition and Quality
        Assessment, 2021 (arXiv 2103.06627), sec. 3.2.
    """

    def __init__(
        self,
        l_a: float = 10.0,
        u_a: float = 110.0,
        l_m: float = 0.45,
        u_m: float = 0.8,
        lambda_g: float = 35.0,
    ) -> None:
        super().__init__()
        if not 0 < l_a < u_a < math.inf:
            raise ValueError(f"l_a and u_a must satisfy 0 < l_a < u_a < inf, got {l_a} and {u_a}")
        if not 0 <= l_m <= u_m < math.pi:
            raise ValueError(f"l_m and u_m must satisfy 0 <= l_m <= u_m < pi, got {l_m} and {u_m}")
        if not 0 <= lambda_g < math.inf:
            raise ValueError(f"lambda_g must be at least 0 and finite, got {lambda_g}")
        self.l_a, self.u_a = l_a, u_a
        self.l_m, self.u_m = l_m, u_m
        self.lambda_g = lambda_g

    def forward(self, cos_y: Tensor, norm: Tensor, label: Tensor) -> Tensor:
        a = norm.clamp(self.l_a, self.u_a)
        slope = (self.u_m - self.l_m) / (self.u_a - self.l_a)
        m = (self.l_m + slope * (a - self.l_a)).to(cos_y.dtype)
        return torch.where(cos_y > 0, torch.cos(angle(cos_y) + m), cos_y)

    def penalty(self, norm: Tensor) -> Tensor:
        a = norm.clamp(self.l_a, self.u_a)
        return self.lambda_g * (a / self.u_a**2 + 1 / a)
