"""Dynamic Class Pool: the softmax over the newest identities, features of theirs as centres."""

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
    labels_on_host,
    number_of_slots,
    random_unit_vectors,
    to_device,
    world_size,
)
from .slots import Slots, WritePlan


class DynamicClassPool(MomentumClassifier):
    r"""F2C's classifier: Q slots of two features each take the place of C class centres.

    A step has B identities with two images :math:`a, b` each and B further images, in halves
    :math:`i_1, i_2`. With :math:`x = [a, i_1]`, :math:`y = [b, i_2]`, probe net P and gallery net G

    .. math::

        L = \ell(P(x), T \oplus G(y)) + \ell(P(y), T \oplus G(x))

    where :math:`T \oplus G(\cdot)` is the pool after these features were written to it. The first
    write is undone, the second stays. An identity that is not in the pool takes the slot that was
    written least recently, and its row 0; one that is there takes its slot's rows in turn.

    .. math::

        \ell(X, T) = \sum_{r=0}^{1} \Big[ \operatorname{mean}_{i:\, y_i \in T} -\log
            \frac{e^{s \cos'_{y_i}}}{e^{s \cos'_{y_i}} + \sum_{j \ne y_i} e^{s\, n(\cos_{ij})}}
            + \operatorname{mean}_{i:\, y_i \notin T} \frac{1}{k}
              \sum_{j \in \text{top } k} \max(0, \cos_{ij}) \Big]

    with :math:`\cos_{ij}` the cosine of embedding i to slot j: to its row 0, and for r = 1 to its
    row 1 where the slot's identity had been in the pool already when it was written. So images of
    identities outside the pool are driven away from the k identities in it that they resemble
    most, :math:`k = \min(\max(\lfloor Q / 5000 \rfloor, 3), 10)`.

    Args:
        num_classes, embedding_size, margin, scale, interclass_filter: as
            :class:`fastface_lightning.classifiers.Classifier`.
        pool_size: Q: an int, slots; a float up to 1, a share of the identities; None, a tenth of
            them, but at least 512, or all where there are fewer.
        momentum: of the gallery net, in [0, 1).

    Attributes:
        queue: (2, Q, D) the two rows of unit features; random at first.
        in_pool: share of the images of the last step, and rank, whose identity was in the pool.

    References:
        Wang et al., An Efficient Training Approach for Very Large Scale Face Recognition, CVPR 2022
        (arXiv 2105.10375), section 3; k, the rows' turns and the rollback as in its release.
    """

    batches = "dual"
    loaders = ("instance", "identity")

    def __init__(
        self,
        num_classes: int,
        embedding_size: int = 512,
        margin: Margin | None = None,
        scale: float = 32.0,
        interclass_filter: float | None = None,
        pool_size: float | None = None,
        momentum: float = 0.99,
    ) -> None:
        super().__init__(num_classes, embedding_size, margin, scale, interclass_filter, momentum)
        if pool_size is None:
            pool_size = min(num_classes, max(int(0.1 * num_classes), 512))
        self.pool_size = number_of_slots("pool_size", pool_size, num_classes)
        self.num_hardest = min(max(self.pool_size // 5000, 3), 10, self.pool_size)
        self.register_buffer("queue", random_unit_vectors(2, self.pool_size, embedding_size))
        self.slots = Slots(self.pool_size)
        self.in_pool = 0.0

    def training_loss(self, probe: nn.Module, batch: Batch) -> Tensor:
        self.check_batch(batch)
        (x, x_labels), (y, y_labels) = halves(batch)
        written_y, written_x = (self._identities_written(labels) for labels in (y_labels, x_labels))
        # The gallery net first: nothing of the probe net's is held for its backward yet.
        features_y, features_x = self.encode(probe, y), self.encode(probe, x)
        self.in_pool = 0.0
        first = self._half_loss(probe(x), x_labels, features_y, written_y, commit=False)
        second = self._half_loss(probe(y), y_labels, features_x, written_x, commit=True)
        return first + second

    def check_batch_size(self, batch_size: int) -> None:
        self._check_writes(batch_size + (batch_size + 1) // 2)

    def _check_writes(self, count: int) -> None:
        identities = min(count, self.num_classes)
        if self.pool_size < identities:
            raise ValueError(
                f"pool_size must be at least the {identities} identities that a batch may write, "
                f"got {self.pool_size}"
            )

    def sample_batch(self, batch_size: int) -> Batch:
        pairs, labels = (torch.arange(2 * batch_size) % self.num_classes).split(batch_size)
        images = torch.empty(2 * batch_size, 3, 1, 1)
        return {
            "identity": (images, pairs.repeat_interleave(2)),
            "instance": (images[:batch_size], labels),
        }

    def _identities_written(self, labels: Tensor) -> list[int]:
        """The identities that all ranks write in a half."""
        written = all_gather(labels.to(self.queue.device)) if world_size() > 1 else labels
        self._check_writes(len(written))
        return labels_on_host(written, self.num_classes)

    def _half_loss(
        self, embeddings: Tensor, labels: Tensor, features: Tensor, written: list[int], commit: bool
    ) -> Tensor:
        """Loss with features (M, D) in the pool, of ``written``; they stay there if ``commit``."""
        self._check(embeddings, labels)
        features = all_gather(normalize_rows(features)[0])
        plan = self.slots.plan(written)
        slots = self.slots.find(labels_on_host(labels, self.num_classes), plan)
        before = self._write(plan, features[to_device(plan.writes, features.device)])
        labels = to_device(labels, embeddings.device)
        loss = eager_backward(
            lambda x: self._pool_loss(x, labels, slots, plan.rewritten),
            self._at_least_float32(embeddings),
        )
        if commit:
            self.slots.commit(plan)
        else:
            self._write(plan, before)
        return loss

    def _write(self, plan: WritePlan, features: Tensor) -> Tensor:
        """Write features (W, D) to the plan's W places; returns what was there."""
        places = to_device([plan.rows, plan.slots], self.queue.device).unbind()
        before = self.queue[places]
        self.queue[places] = features
        return before

    def _pool_loss(
        self, x: Tensor, labels: Tensor, slots: list[int], rewritten: list[int]
    ) -> Tensor:
        """The loss of a half's embeddings (N, D) against both rows, the features written."""
        x, norm = normalize_rows(x)
        cos = x @ self.queue[0].to(x.dtype).T
        index = to_device(rewritten, x.device)
        second = cos.index_copy(1, index, x @ self.queue[1, index].to(x.dtype).T)
        inside = [i for i, slot in enumerate(slots) if slot >= 0]
        outside = [i for i, slot in enumerate(slots) if slot < 0]
        self.in_pool += len(inside) / len(slots) / 2
        loss = x.new_zeros(())
        if inside:
            rows, own = to_device([inside, [slots[i] for i in inside]], x.device).unbind()
            both = torch.cat([cos[rows], second[rows]])
            of_both = (values.repeat(2) for values in (norm[rows], labels[rows], own))
            loss += self._softmax_loss(both, *of_both)
        if outside:
            rows = to_device(outside, x.device)
            both = torch.cat([cos[rows], second[rows]])
            if self.interclass_filter is not None:
                both = both.masked_fill(both > self.interclass_filter, 0)
            loss += both.topk(self.num_hardest).values.clamp(min=0).mean()
        return 2 * loss  # a mean over both rows so far, and it is their sum

    def _softmax_loss(self, cos: Tensor, norm: Tensor, labels: Tensor, own: Tensor) -> Tensor:
        """Mean margin softmax of cosines (N, Q), the own slots (N,) given."""
        place = torch.arange(len(own), device=own.device), own
        cos_y = cos[place]
        cos_y_prime = self.margin(cos_y, norm, labels)
        logits = Negatives(self.margin, self.interclass_filter)(cos, cos_y, cos_y_prime)
        logits[place] = cos_y_prime
        loss = F.cross_entropy(self.scale * logits, own, reduction="none")
        return (loss + self.margin.penalty(norm)).mean()

    def get_extra_state(self) -> Tensor:
        return self.slots.to_tensor()

    def set_extra_state(self, state: Tensor) -> None:
        self.slots.load(state)


def halves(batch: Batch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images and labels x = [a, i1] and y = [b, i2]; in ``identity`` a and b take turns."""
    (pairs, pair_labels), (images, labels) = batch["identity"], batch["instance"]
    half = len(images) // 2
    first = torch.cat([pairs[0::2], images[:half]]), torch.cat([pair_labels[0::2], labels[:half]])
    second = torch.cat([pairs[1::2], images[half:]]), torch.cat([pair_labels[1::2], labels[half:]])
    return first, second
