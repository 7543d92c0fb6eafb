"""AttFC: attention over a few images of an identity makes its centre; a queue keeps the newest."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..margins import Margin
from .base import Negatives, normalize_rows
from .momentum import (
    Batch,
    MomentumClassifier,
    all_gather,
    eager_backward,
    number_of_slots,
    random_unit_vectors,
    to_device,
    world_size,
)


class AttentionClassifier(MomentumClassifier):
    r"""AttFC's classifier: a queue of Q centres, first in first out, takes the place of all C.

    For an image with embedding :math:`q = P(x)` and K further images of its identity, whose
    features :math:`f_k = G(x_k)` come from the momentum encoder G,

    .. math::

        a_k = \frac{e^{\cos(q, f_k)}}{\sum_l e^{\cos(q, f_l)}}, \qquad
        c = \sum_{k=1}^{K} a_k f_k, \qquad
        L = -\log \frac{e^{s \cos'(q, c)}}
            {e^{s \cos'(q, c)} + \sum_{j:\, y_j \ne y} e^{s\, n(\cos(q, c_j))}}

    where :math:`c_j` are the centres in the queue with their labels :math:`y_j`: those of the own
    identity are left out. No gradient passes through a centre. After the step the batch's centres
    join the queue, of unit length, and the oldest leave it.

    Args:
        num_classes, embedding_size, margin, scale, interclass_filter: as
            :class:`fastface_lightning.classifiers.Classifier`.
        queue_size: Q: an int, centres; a float up to 1, a share of the identities.
        keys: K, images that a centre is made of, at least 1.
        momentum: of the momentum encoder, in [0, 1).

    Attributes:
        queue: (Q, D) unit centres; random at first.
        queue_labels: (Q,) int64, their identities; -1 at first.
        position: int64 scalar, where the next centre goes.

    References:
        AttFC: Attention Fully-Connected Layer for Large-Scale Face Recognition with One GPU, 2025
        (arXiv 2503.06839). Its release rounds Q down to a multiple of the batch, which a queue that
        wraps around does not need.
    """

    batches = "keys"
    loaders = ("identity",)
    queue_labels: Tensor
    position: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_size: int = 512,
        margin: Margin | None = None,
        scale: float = 64.0,
        interclass_filter: float | None = None,
        queue_size: float = 0.3,
        keys: int = 2,
        momentum: float = 0.999,
    ) -> None:
        super().__init__(num_classes, embedding_size, margin, scale, interclass_filter, momentum)
        if not isinstance(keys, int) or keys < 1:
            raise ValueError(f"keys must be at least 1 image, got {keys}")
        self.queue_size = number_of_slots("queue_size", queue_size, num_classes)
        self.keys = keys
        self.register_buffer("queue", random_unit_vectors(self.queue_size, embedding_size))
        self.register_buffer("queue_labels", torch.full((self.queue_size,), -1))
        self.register_buffer("position", torch.tensor(0))

    def training_loss(self, probe: nn.Module, batch: Batch) -> Tensor:
        self.check_batch(batch)
        images, labels = (part.unflatten(0, (-1, self.keys + 1)) for part in batch["identity"])
        self.check_batch_size(len(labels) * world_size())
        features = self.encode(probe, images[:, 1:].flatten(0, 1)).unflatten(0, (-1, self.keys))
        # Contiguous: of a view, all images would be held for the backward.
        embeddings = self._at_least_float32(probe(images[:, 0].contiguous()))
        labels = to_device(labels, embeddings.device)
        own = labels[:, 0]
        self._check(embeddings, own)
        centers = self.centers(embeddings.detach(), features, labels[:, 1:] == own[:, None])
        loss = eager_backward(lambda x: self._queue_loss(x, own, centers), embeddings)
        self._enqueue(all_gather(centers), all_gather(own.contiguous()))
        return loss

    def check_batch_size(self, batch_size: int) -> None:
        if self.queue_size < batch_size:
            raise ValueError(
                f"queue_size must be at least the {batch_size} centres of a batch, got "
                f"{self.queue_size}"
            )

    def sample_batch(self, batch_size: int) -> Batch:
        labels = torch.arange(batch_size) % self.num_classes
        images = torch.empty(batch_size * (self.keys + 1), 3, 1, 1)
        return {"identity": (images, labels.repeat_interleave(self.keys + 1))}

    def centers(self, queries: Tensor, features: Tensor, same: Tensor) -> Tensor:
        """The unit centres (N, D) of embeddings (N, D) and features (N, K, D) of their identities.

        Where ``same`` (N, K) is false, an image that could not be read has been replaced by another
        identity's: it is left out, unless all are.
        """
        cos = F.cosine_similarity(queries.to(features.dtype)[:, None], features, dim=2)
        cos = cos.masked_fill(~same & same.any(1, keepdim=True), -torch.inf)
        return normalize_rows((cos.softmax(1)[:, :, None] * features).sum(1))[0]

    def _queue_loss(self, embeddings: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
        x, norm = normalize_rows(embeddings)
        cos_y = (x * centers).sum(1)
        cos_y_prime = self.margin(cos_y, norm, labels)
        cos = x @ self.queue.to(x.dtype).T
        negatives = Negatives(self.margin, self.interclass_filter)(cos, cos_y, cos_y_prime)
        negatives = negatives.masked_fill(labels[:, None] == self.queue_labels, -torch.inf)
        others = (self.scale * negatives).logsumexp(1)
        loss = -F.logsigmoid(self.scale * cos_y_prime - others)
        return (loss + self.margin.penalty(norm)).mean()

    def _enqueue(self, centers: Tensor, labels: Tensor) -> None:
        places = (self.position + torch.arange(len(labels), device=labels.device)) % self.queue_size
        self.queue[places] = centers
        self.queue_labels[places] = labels
        self.position.copy_((self.position + len(labels)) % self.queue_size)
