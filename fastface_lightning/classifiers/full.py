"""Every embedding against every identity: the margin softmax in its plain form."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import CenterClassifier, Negatives, normalize_rows


class FullClassifier(CenterClassifier):
    """The loss of :class:`CenterClassifier` as its equation reads, by way of all N x C cosines.

    For up to some 10,000 identities, and to check the other classifiers against. At its peak it
    holds, beside ``weight`` and its gradient, about three tensors of C x D and four of N x C.

    Args and References: as :class:`CenterClassifier`.
    """

    def softmax_loss(self, x: Tensor, norm: Tensor, labels: Tensor) -> Tensor:
        w, _ = normalize_rows(self.weight.to(x.dtype))
        cos = x @ w.T
        own = torch.arange(len(labels), device=labels.device), labels
        cos_y = cos[own]
        cos_y_prime = self.margin(cos_y, norm, labels)
        logits = Negatives(self.margin, self.interclass_filter)(cos, cos_y, cos_y_prime)
        # In place: nothing upstream needs these values in its backward (gather would).
        logits[own] = cos_y_prime
        logits *= self.scale
        return F.cross_entropy(logits, labels, reduction="none")
