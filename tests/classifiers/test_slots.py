"""The slots of a pool against an ordered dict that is written one identity after the other."""

from collections import OrderedDict

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastface_lightning.classifiers.slots import Slots


class Plain:
    """Identity to slot and next row, oldest write first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.taken: OrderedDict[int, tuple[int, int]] = OrderedDict()

    def write(self, identity: int) -> tuple[int, int, bool]:
        """Row and slot of a write, and whether the identity was there."""
        if identity in self.taken:
            slot, row = self.taken.pop(identity)
            self.taken[identity] = slot, 1 - row
            return row, slot, True
        if len(self.taken) < self.size:
            slot = len(self.taken)
        else:
            _, (slot, _) = self.taken.popitem(last=False)
        self.taken[identity] = slot, 1
        return 0, slot, False


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, list[tuple[list[int], bool]]]:
    """A size, and batches of at most so many different identities, some of them rolled back."""
    size = draw(st.integers(1, 12))
    identities = st.integers(0, draw(st.integers(1, 30)))
    batch = st.lists(identities, min_size=1, max_size=30).filter(lambda b: len(set(b)) <= size)
    return size, draw(st.lists(st.tuples(batch, st.booleans()), max_size=20))


@given(batches())
@settings(max_examples=60, deadline=None)
def test_as_an_ordered_dict(case: tuple[int, list[tuple[list[int], bool]]]) -> None:
    size, steps = case
    slots, plain = Slots(size), Plain(size)
    for batch, commit in steps:
        before, state_before = OrderedDict(plain.taken), slots.to_tensor()
        written, rewritten = {}, set()
        for write, identity in enumerate(batch):
            row, slot, there = plain.write(identity)
            written[row, slot] = write
            rewritten |= {slot} if there else set()
        plan = slots.plan(batch)
        places = zip(plan.rows, plan.slots, strict=True)
        assert dict(zip(places, plan.writes, strict=True)) == written
        assert set(plan.rewritten) == rewritten and len(plan.rewritten) == len(rewritten)
        identities = range(31)
        expected = [plain.taken[i][0] if i in plain.taken else -1 for i in identities]
        assert slots.find(identities, plan) == expected
        assert torch.equal(slots.to_tensor(), state_before)  # planning changes nothing
        if commit:
            slots.commit(plan)
        else:
            plain.taken = before
        state = slots.to_tensor()
        columns = [[i, *place] for i, place in plain.taken.items()]
        assert state.dtype == torch.int64
        assert state.T.tolist() == columns + [[-1, -1, -1]] * (size - len(columns))
        slots = Slots(size)
        slots.load(state)
