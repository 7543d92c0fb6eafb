"""The slots of a pool against an ordered dict that is written one identity after the other."""

from collections import OrderedDict

import pytest
import torch
from hypothesis import given
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
    """A size, and batches of at most so many different identities, some of them not kept."""
    size = draw(st.integers(1, 12))
    identities = st.integers(0, draw(st.integers(1, 30)))
    batch = st.lists(identities, min_size=1, max_size=30).filter(lambda b: len(set(b)) <= size)
    return size, draw(st.lists(st.tuples(batch, st.booleans()), max_size=20))


@given(batches())
def test_as_an_ordered_dict(case: tuple[int, list[tuple[list[int], bool]]]) -> None:
    size, steps = case
    slots, plain = Slots(size), Plain(size)
    for batch, keep in steps:
        before = OrderedDict(plain.taken)
        written, again = {}, set()
        for write, identity in enumerate(batch):
            row, slot, there = plain.write(identity)
            written[row, slot] = write
            again |= {slot} if there else set()
        placement = slots.place(batch)
        assert (
            dict(
                zip(
                    zip(placement.rows, placement.slots, strict=True), placement.writes, strict=True
                )
            )
            == written
        )
        assert set(placement.again) == again and len(placement.again) == len(again)
        sought = range(31)
        expected = [plain.taken[i][0] if i in plain.taken else -1 for i in sought]
        assert slots.find(sought, placement) == expected
        if keep:
            slots.keep(placement)
        else:
            plain.taken = before
        state = slots.to_tensor()
        rows = [[i, *place] for i, place in plain.taken.items()]
        assert state.T.tolist() == rows + [[-1, -1, -1]] * (size - len(rows))
        slots = Slots(size)
        slots.load(state)


def test_an_identity_evicted_by_its_own_batch_comes_back_as_a_new_one() -> None:
    slots = Slots(2)
    slots.keep(slots.place([7, 8]))
    placement = slots.place([9, 7])  # 9 takes the slot of 7, 7 that of 8
    assert placement.evicted == {7, 8} and placement.again == []
    assert (placement.rows, placement.slots) == ([0, 0], [0, 1])
    slots.keep(placement)
    assert slots.to_tensor().tolist() == [[9, 7], [0, 1], [1, 1]]


def test_what_is_not_kept_changes_nothing() -> None:
    slots = Slots(3)
    slots.keep(slots.place([1, 2, 3, 1]))
    before = slots.to_tensor()
    slots.place([4, 1, 5])
    assert torch.equal(slots.to_tensor(), before)


@pytest.mark.parametrize("filled", [0, 2, 4])
def test_a_state_has_one_shape(filled: int) -> None:
    slots = Slots(4)
    slots.keep(slots.place(range(filled)))
    state = slots.to_tensor()
    assert state.shape == (3, 4) and state.dtype == torch.int64
    assert (state >= 0).sum() == 3 * filled
