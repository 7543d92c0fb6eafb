"""Which identity has which slot of a pool; the one that was written least recently goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Placement(NamedTuple):
    """Where a batch of identities goes, each slot having two rows.

    Attributes:
        taken: slot and next row of each identity, in the order of their last write.
        evicted: identities that lost their slot.
        again: slots whose identity was there before one of the writes.
        rows, slots, writes: of each place that is written, its row and slot, and which of the
            batch's writes stays there: the last one.
    """

    taken: dict[int, tuple[int, int]]
    evicted: set[int]
    again: list[int]
    rows: list[int]
    slots: list[int]
    writes: list[int]


class Slots:
    """Slots of identities, with O(1) work for each identity of a batch.

    :meth:`place` finds out where a batch goes and changes nothing; :meth:`keep` makes it so. A
    write that is to be undone is placed and not kept.

    Args:
        size: number of slots, at least 1.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._taken: OrderedDict[int, tuple[int, int]] = OrderedDict()  # oldest write first

    def place(self, identities: Iterable[int]) -> Placement:
        """Write one identity after the other: an absent one takes a free slot or else the one that
        was written least recently, from row 0; one that is there takes its slot's other row.

        Of at most ``size`` different identities, else one would evict another of the same batch.
        """
        taken: dict[int, tuple[int, int]] = {}
        evicted: set[int] = set()
        again: dict[int, None] = {}
        last: dict[tuple[int, int], int] = {}
        oldest = iter(self._taken.items())
        free = len(self._taken)
        for write, identity in enumerate(identities):
            known = taken.pop(identity, None)
            if known is None and identity not in evicted:
                known = self._taken.get(identity)
            if known is not None:
                slot, row = known
                again[slot] = None
            elif free < self.size:
                slot, row, free = free, 0, free + 1
            else:
                gone, (slot, _) = next(item for item in oldest if item[0] not in taken)
                row = 0
                evicted.add(gone)
            taken[identity] = slot, 1 - row
            last[row, slot] = write
        rows, slots = [row for row, _ in last], [slot for _, slot in last]
        return Placement(taken, evicted, list(again), rows, slots, list(last.values()))

    def keep(self, placement: Placement) -> None:
        """Let a placement, made by the last call of :meth:`place`, be what is."""
        for identity in placement.evicted:
            del self._taken[identity]
        for identity, place in placement.taken.items():
            self._taken[identity] = place
            self._taken.move_to_end(identity)

    def find(self, identities: Iterable[int], placement: Placement) -> list[int]:
        """Slot of each identity as the placement leaves them; -1 where there is none."""

        def slot(identity: int) -> int:
            if identity in placement.taken:
                return placement.taken[identity][0]
            return -1 if identity in placement.evicted else self._taken.get(identity, (-1, 0))[0]

        return [slot(identity) for identity in identities]

    def to_tensor(self) -> Tensor:
        """Identity, slot and next row, int64 (3, size), the oldest write first; -1 where free."""
        rows = [(identity, *place) for identity, place in self._taken.items()]
        rows += [(-1, -1, -1)] * (self.size - len(rows))
        return torch.tensor(rows).T.contiguous()

    def load(self, state: Tensor) -> None:
        """Take what :meth:`to_tensor` gave."""
        rows: Sequence[tuple[int, int, int]] = state.T.tolist()
        self._taken = OrderedDict((i, (slot, row)) for i, slot, row in rows if i >= 0)
