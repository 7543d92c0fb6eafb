"""Which identity has which slot of a pool; the one that was written least recently goes first."""

from __future__ import annotations

from collections import ChainMap, OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class WritePlan(NamedTuple):
    """Where a batch of identities is written, each slot having two rows."""

    assigned: dict[int, tuple[int, int]]  # slot and next row of each identity, oldest write first
    evicted: set[int]  # identities that lost their slot
    rewritten: list[int]  # slots whose identity was there before one of the writes
    rows: list[int]  # of each place that is written, its row,
    slots: list[int]  # its slot,
    writes: list[int]  # and which of the batch's writes stays there: the last one


class Slots:
    """Least-recently-written slots of identities, with O(1) work for each identity of a batch.

    :meth:`plan` finds out where a batch goes and changes nothing; :meth:`commit` makes it so.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._assigned: OrderedDict[int, tuple[int, int]] = OrderedDict()  # oldest write first

    def plan(self, identities: Iterable[int]) -> WritePlan:
        """Write one identity after the other: an absent one takes a free slot or else the one that
        was written least recently, from row 0; one that is there takes its slot's other row.

        Of at most ``size`` different identities, else one would evict another of the same batch.
        """
        assigned: dict[int, tuple[int, int]] = {}
        evicted: set[int] = set()
        rewritten: dict[int, None] = {}
        last: dict[tuple[int, int], int] = {}
        oldest = iter(self._assigned.items())
        free = len(self._assigned)
        for write, identity in enumerate(identities):
            place = assigned.pop(identity, None)
            if place is None and identity not in evicted:
                place = self._assigned.get(identity)
            if place is not None:
                slot, row = place
                rewritten[slot] = None
            elif free < self.size:
                slot, row, free = free, 0, free + 1
            else:
                victim, (slot, _) = next(item for item in oldest if item[0] not in assigned)
                row = 0
                evicted.add(victim)
            assigned[identity] = slot, 1 - row
            last[row, slot] = write
        rows, slots = [row for row, _ in last], [slot for _, slot in last]
        return WritePlan(assigned, evicted, list(rewritten), rows, slots, list(last.values()))

    def commit(self, plan: WritePlan) -> None:
        """Carry out the last plan."""
        for identity in plan.evicted:
            del self._assigned[identity]
        for identity, place in plan.assigned.items():
            self._assigned[identity] = place
            self._assigned.move_to_end(identity)

    def find(self, identities: Iterable[int], plan: WritePlan) -> list[int]:
        """Slot of each identity once the plan is carried out; -1 where there is none."""
        nowhere = (-1, 0)
        evicted = dict.fromkeys(plan.evicted, nowhere)
        after = ChainMap(plan.assigned, evicted, self._assigned)
        return [after.get(identity, nowhere)[0] for identity in identities]

    def to_tensor(self) -> Tensor:
        """Identities, slots and next rows, int64 (3, size), oldest write first; -1 where free."""
        columns = [(identity, *place) for identity, place in self._assigned.items()]
        columns += [(-1, -1, -1)] * (self.size - len(columns))
        return torch.tensor(columns).T.contiguous()

    def load(self, state: Tensor) -> None:
        """Take what :meth:`to_tensor` gave."""
        self._assigned = OrderedDict(
            (i, (slot, row)) for i, slot, row in state.T.tolist() if i >= 0
        )
