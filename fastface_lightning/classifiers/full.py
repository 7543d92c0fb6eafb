"""Every embedding against every identity: the margin softmax in its plain form."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..margins import CosFace, Margin


class FullClassifier(nn.Module):
    r"""Mean margin-softmax loss of a batch over all C identities.

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
    The margin sees only the N target cosines; the forward makes no second N x C matrix for it.

    Args:
        num_classes: number of identities C, at least 1.
        embedding_size: length D of an embedding, at least 1.
        margin: the margin; ``CosFace()`` if None.
        scale: s, positive.

    Raises:
        ValueError: if an argument is outside its range.

    References:
        Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, 2019
        (arXiv 1801.07698), eq. 2 to 4.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int = 512,
        margin: Margin | None = None,
        scale: float = 64.0,
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
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.margin = CosFace() if margin is None else margin
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the centres from N(0, 0.01), 0.01 being the standard deviation."""
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of the batch.

        Args:
            embeddings: (N, D) float, any length; a zero embedding has cosine 0 to every class.
            labels: (N,) int64 in [0, C).

        Returns:
            Scalar loss, float32 (float64 for a float64 ``weight``).

        Raises:
            ValueError: if shapes or dtypes do not fit or, on the CPU, a label is out of range. On
                an accelerator looking at the labels would stall every step, so there a label out
                of range ends in the device's own assertion.
        """
        self._check(embeddings, labels)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(embeddings.device.type, enabled=False):
            x, norm = _unit(embeddings.to(dtype))
            w, _ = _unit(self.weight.to(dtype))
            cos = x @ w.T
            own = torch.arange(len(labels), device=labels.device), labels
            cos_y = cos[own]
            cos_y_prime = self.margin(cos_y, norm, labels)
            logits = self.margin.negatives(cos, cos_y, cos_y_prime)
            # In place, as nothing upstream needs these values in its backward (indexing does not,
            # gather would).
            logits[own] = cos_y_prime
            logits *= self.scale
            return F.cross_entropy(logits, labels) + self.margin.penalty(norm).mean()

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, embedding_size={self.embedding_size}, "
            f"scale={self.scale}"
        )

    def _check(self, embeddings: Tensor, labels: Tensor) -> None:
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embedding_size:
            raise ValueError(
                f"embeddings must be (N, {self.embedding_size}), got {tuple(embeddings.shape)}"
            )
        if len(embeddings) == 0:
            raise ValueError("embeddings must hold at least one row, got 0")
        if labels.shape != embeddings.shape[:1]:
            raise ValueError(
                f"labels must be ({len(embeddings)},), one for each embedding, "
                f"got {tuple(labels.shape)}"
            )
        if labels.dtype != torch.int64:
            raise ValueError(f"labels must be int64, got {labels.dtype}")
        if labels.device.type == "cpu":
            outside = labels[(labels < 0) | (labels >= self.num_classes)]
            if len(outside) > 0:
                raise ValueError(
                    f"labels of {self.num_classes} classes must lie in [0, {self.num_classes}), "
                    f"got {outside[0]}"
                )


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of x at length one, and their lengths: (N, D) -> (N, D), (N,)."""
    norm = torch.linalg.vector_norm(x, dim=1)
    # A zero row has no direction: it stays zero, and its gradient is not blown up by 1 / norm.
    return x / torch.where(norm > 0, norm, 1.0)[:, None], norm
