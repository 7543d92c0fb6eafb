"""A sample to look at: which images of which identities."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastface_lightning.data.datasets.sample import pick_images


@given(
    labels=st.lists(st.integers(0, 12), max_size=60),
    identities=st.integers(1, 8),
    images=st.integers(1, 5),
)
def test_how_many_and_in_which_order(labels: list[int], identities: int, images: int) -> None:
    picked = pick_images(np.array(labels, np.int32), identities, images)
    assert len(set(picked)) == len(picked)
    assert picked == sorted(picked, key=lambda i: (labels[i], i))
    shown = {labels[i] for i in picked}
    assert len(shown) == min(identities, len(set(labels)))
    for k in shown:
        assert sum(labels[i] == k for i in picked) == min(images, labels.count(k))
    several = {k for k in labels if labels.count(k) > 1}
    assert len(shown & several) == min(identities, len(several))


def test_evenly_from_first_to_last() -> None:
    labels = np.repeat(np.arange(101), 21)
    picked = np.array(pick_images(labels, 5, 3))
    assert labels[picked[::3]].tolist() == [0, 25, 50, 75, 100]
    assert (picked % 21).tolist() == [0, 10, 20] * 5
