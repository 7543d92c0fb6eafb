"""A margin makes the target cosine smaller, so that the network must earn more than a bare win."""

from abc import ABC, abstractmethod
from inspect import signature

import torch
from torch import Tensor, nn


class Margin(nn.Module, ABC):
    r"""What every margin is to a classifier: one required map and two optional hooks.

    Training with a margin minimises, over a batch of :math:`N` embeddings,

    .. math::

        L = \frac{1}{N} \sum_{i=1}^{N} \left[ -\log
            \frac{e^{s \cos'_{y_i}}}
                 {e^{s \cos'_{y_i}} + \sum_{j \ne y_i} e^{s\, n(\cos_{ij})}} + g(a_i) \right]

    where :math:`\cos_{ij}` is the cosine between embedding :math:`i` and the centre of class
    :math:`j`, :math:`y_i` the label, :math:`a_i` the norm of the embedding before it was
    normalised and :math:`s` the scale. The margin supplies :math:`\cos'_y` (:meth:`forward`),
    :math:`n` (:meth:`negatives`, by default the identity) and :math:`g` (:meth:`penalty`, by
    default zero). All three are in cosine units: the classifier applies the scale.

    Raises:
        ValueError: of every margin, if an argument is outside its range.
    """

    @abstractmethod
    def forward(self, cos_y: Tensor, norm: Tensor, label: Tensor) -> Tensor:
        """Return the target cosine after the margin, cos_y', (N,) of the dtype of ``cos_y``.

        Args:
            cos_y: cosine to the centre of the own class, (N,) float in [-1, 1] up to rounding.
            norm: length of the embedding before normalisation, (N,) float, at least 0.
            label: class of the embedding, (N,) int64.
        """

    def negatives(self, cos: Tensor, cos_y: Tensor, cos_y_prime: Tensor) -> Tensor:
        """Return the cosines to the other classes as they enter the loss, n(cos), (N, K).

        Elementwise, so that it may be called on any chunk of the classes. What it returns in the
        column of the own class is replaced by ``cos_y_prime``; the classifier does so in place, so
        the backward of the last operation here must not need its result.

        Args:
            cos: cosines to K classes, (N, K) float.
            cos_y: target cosine before the margin, (N,) float.
            cos_y_prime: target cosine after the margin, (N,) float.
        """
        return cos

    def penalty(self, norm: Tensor) -> Tensor:
        """Return what each embedding adds to the loss for its norm: (N,) float -> (N,) float."""
        return torch.zeros_like(norm)

    def extra_repr(self) -> str:
        return constructor_arguments(self)


def constructor_arguments(module: nn.Module) -> str:
    """``name=value`` of the plain arguments that a module keeps under their names, for its repr."""
    kept = vars(module)
    names = signature(type(module)).parameters
    return ", ".join(f"{name}={kept[name]!r}" for name in names if name in kept)


def angle(cos: Tensor) -> Tensor:
    r"""Return :math:`\theta = \arccos(\cos)` in [0, pi], with a gradient that is finite everywhere.

    .. math::

        \theta = \operatorname{atan2}(\sin\theta, \cos\theta), \qquad
        \sin\theta = \sqrt{(1 - \cos\theta)(1 + \cos\theta)}, \qquad
        \frac{d\theta}{d\cos\theta} = -\frac{1}{\sin\theta}

    The derivative of arccos is infinite at -1 and 1, and arccos is NaN when rounding carries a
    cosine beyond them. Here such a cosine has the angle 0 or pi, and a derivative near zero. Short
    of the edge nothing is cut off: the float32 next to 1 has a sine of 3.5e-4, so the derivative
    stays below 3000.
    """
    # The smallest normal number instead of 0 keeps sqrt differentiable and changes no value.
    smallest = torch.finfo(cos.dtype).tiny
    sin = ((1 - cos) * (1 + cos)).clamp_min(smallest).sqrt()
    return torch.atan2(sin, cos)


@torch.no_grad()
def update(running: Tensor, batch: Tensor, alpha: float) -> None:
    """Move a running average towards a batch's value, in place; not if that is not finite."""
    step = alpha * (batch - running)
    running += torch.where(step.isfinite(), step, 0)  # decided on the device: nothing waits for it
