"""No margin: the normalised softmax every other margin is measured against."""

from torch import Tensor

from .base import Margin


class Softmax(Margin):
    r"""Leave the target cosine as it is.

    .. math:: \cos'_y = \cos_y

    References:
        Wang et al., NormFace: L2 Hypersphere Embedding for Face Verification, 2017
        (arXiv 1704.06369), the normalised softmax loss.
    """

    def forward(self, cos_y: Tensor, norm: Tensor, label: Tensor) -> Tensor:
        return cos_y
