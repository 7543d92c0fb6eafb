"""What every classifier is: a margin and a scale over cosines, and one loss for a batch."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..margins import CosFace, Margin
from ..margins.base import constructor_arguments


class Classifier(nn.Module):
    """A margin and a scale for embeddings of C identities.

    Args:
        num_classes: number of identities C, at least 1.
        embedding_size: length D of an embedding, at least 1.
        margin: the margin; ``CosFace()`` if None.
        scale: s, positive.
        interclass_filter: cosine in [-1, 1]; a negative above it counts as 0 and gets no gradient,
            as two identities so alike are often one person labelled twice. None keeps them all;
            0.4 is InsightFace's value for unclean data.

    Raises:
        ValueError: if an argument is outside its range, here and in every subclass.

    Attributes:
        batches: what it trains on; :class:`fastface_lightning.data.FaceDataModule` has the names.
    """

    batches = "images"

    def __init__(
        self,
        num_classes: int,
        embedding_size: int = 512,
        margin: Margin | None = None,
        scale: float = 64.0,
        interclass_filter: float | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if embedding_size < 1:
            raise ValueError(f"embedding_size must be at least 1, got {embedding_size}")
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale must be positive and finite, got {scale}")
        if not isinstance(margin, Margin | None):
            raise ValueError(f"margin must be a Margin, got {margin!r}")
        if interclass_filter is not None and not -1 <= interclass_filter <= 1:
            raise ValueError(f"interclass_filter must lie in [-1, 1], got {interclass_filter}")
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.margin = CosFace() if margin is None else margin
        self.scale = scale
        self.interclass_filter = interclass_filter

    def extra_repr(self) -> str:
        return constructor_arguments(self)

    def _check(self, embeddings: Tensor, labels: Tensor) -> None:
        n, size = len(embeddings), self.embedding_size
        if n == 0 or embeddings.shape != (n, size):
            raise ValueError(f"embeddings must be (N, {size}), got {tuple(embeddings.shape)}")
        if labels.shape != (n,) or labels.dtype != torch.int64:
            raise ValueError(
                f"labels must be int64 ({n},), got {labels.dtype} {tuple(labels.shape)}"
            )
        rule = f"labels must lie in [0, {self.num_classes})"
        out_of_range = (labels < 0) | (labels >= self.num_classes)
        if labels.device.type == "cuda":
            torch._assert_async(~out_of_range.any(), rule)
        # A fake tensor has no values.
        if labels.device.type == "cpu" and type(labels) is Tensor and out_of_range.any():
            raise ValueError(f"{rule}, got {labels[out_of_range][0]}")


class CenterClassifier(Classifier, ABC):
    r"""Mean margin-softmax loss of a batch over C identities.

    .. math::

        \cos_{ij} = \frac{x_i \cdot w_j}{\|x_i\| \|w_j\|}, \qquad
        L = \frac{1}{N} \sum_{i=1}^{N} \left[ -\log
            \frac{e^{s \cos'_{y_i}}}
                 {e^{s \cos'_{y_i}} + \sum_{j \ne y_i} e^{s\, n(\cos_{ij})}} + g(\|x_i\|) \right]

    where :math:`x_i` is the embedding of image :math:`i`, :math:`y_i` its identity, :math:`w_j` the
    centre of identity :math:`j` (a row of ``weight``), :math:`s` the scale, and :math:`\cos'`,
    :math:`n`, :math:`g` the margin's ``forward``, ``negatives`` and ``penalty``.

    The loss is computed in float32 (float64 for a float64 ``weight``) whatever autocast says: with
    s = 64, rounding a cosine near 1 to bfloat16 moves its logit by up to 1/8, to float16 by 1/64.

    Args: as :class:`Classifier`.

    References:
        Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, 2019
        (arXiv 1801.07698), eq. 2 to 4. An et al., Killing Two Birds with One Stone: Efficient and
        Robust Training of Face Recognition CNNs by Partial FC, 2022 (arXiv 2203.15565): the filter.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int = 512,
        margin: Margin | None = None,
        scale: float = 64.0,
        interclass_filter: float | None = None,
    ) -> None:
        super().__init__(num_classes, embedding_size, margin, scale, interclass_filter)
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_size))
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of the batch: a scalar, float32 (float64 for a float64 ``weight``).

        Args:
            embeddings: (N, D) float, any length; a zero embedding has cosine 0 to every class.
            labels: (N,) int64 in [0, C).

        Raises:
            ValueError: if shapes or dtypes do not fit or, on the CPU, a label is out of range. On a
                GPU, where looking would stall every step, that ends in an assertion of the device.
        """
        self._check(embeddings, labels)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(embeddings.device.type, enabled=False):
            x, norm = normalize_rows(embeddings.to(dtype))
            loss = self.softmax_loss(x, norm, labels)
            return (loss + self.margin.penalty(norm)).mean()

    @abstractmethod
    def softmax_loss(self, x: Tensor, norm: Tensor, labels: Tensor) -> Tensor:
        """Return -log softmax of each target, (N,) of the dtype of ``x``.

        Args:
            x: unit embeddings (N, D), float32 or float64.
            norm: their lengths before, (N,).
            labels: (N,) int64, on the CPU known to lie in [0, C).
        """


class Negatives(nn.Module):
    """The cosines to other classes as they enter the loss: filtered, then the margin's.

    A module, so that it can be called again with statistics the margin had earlier.
    """

    def __init__(self, margin: Margin, threshold: float | None) -> None:
        super().__init__()
        self.margin = margin
        self.threshold = threshold

    @property
    def is_identity(self) -> bool:
        """Whether cosines enter as they are."""
        return self.threshold is None and type(self.margin).negatives is Margin.negatives

    def forward(self, cos: Tensor, cos_y: Tensor, cos_y_prime: Tensor) -> Tensor:
        """(N, K) cosines to (N, K); the own class's column is the caller's to replace."""
        if self.threshold is not None:
            cos = cos.masked_fill(cos > self.threshold, 0)
        return self.margin.negatives(cos, cos_y, cos_y_prime)


def normalize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of x at length one, and their lengths before: (N, D) -> (N, D), (N,)."""
    norm = torch.linalg.vector_norm(x, dim=1)
    # A zero row has no direction: it stays zero, and its gradient is not blown up by 1 / norm.
    return x / torch.where(norm > 0, norm, 1.0)[:, None], norm
