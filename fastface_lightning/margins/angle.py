"""The angle of a cosine, with a gradient that is finite everywhere."""

import torch
from torch import Tensor


def angle(cos: Tensor) -> Tensor:
    r"""Return :math:`\theta = \arccos(\cos)`, differentiable up to the edges.

    .. math::

        \theta = \operatorname{atan2}(\sin\theta, \cos\theta), \qquad
        \sin\theta = \sqrt{(1 - \cos\theta)(1 + \cos\theta)}, \qquad
        \frac{d\theta}{d\cos\theta} = -\frac{1}{\sin\theta}

    The derivative of arccos is infinite at -1 and 1, and arccos is NaN when rounding carries a
    cosine beyond them. Here such a cosine has the angle 0 or pi, and a derivative near zero. Short
    of the edge nothing is cut off: the float32 next to 1 has a sine of 3.5e-4, so the derivative
    stays below 3000.

    Args:
        cos: any shape, float, in [-1, 1] up to rounding.

    Returns:
        Angles in radians in [0, pi], shape and dtype of ``cos``.
    """
    # The smallest normal number instead of 0 keeps sqrt differentiable and changes no value.
    smallest = torch.finfo(cos.dtype).tiny
    sin = ((1 - cos) * (1 + cos)).clamp_min(smallest).sqrt()
    return torch.atan2(sin, cos)
