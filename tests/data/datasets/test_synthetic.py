"""Synthetic faces are pure functions of (seed, identity, image); pairs make balanced folds."""

import copy
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fastface_lightning.data import synthetic_pairs
from fastface_lightning.data.datasets.synthetic import SyntheticFaces
from fastface_lightning.data.datasets.synthetic_faces import draw_face
from fastface_lightning.data.formats.image import decode_image, is_packable

SMALL = 32  # px; the drawing is the same, only coarser
words = st.integers(0, 2**32 - 1)
GOLDEN = [6_769_946_338, 41_466_538_660]  # sums of pixels, by weights that say where they lie


def all_images(faces: SyntheticFaces) -> torch.Tensor:
    return torch.stack([faces[i][0] for i in range(len(faces))])


# --- one image


@settings(max_examples=20, deadline=None)
@given(words, words, st.integers(0, 2**32 - 2), st.sampled_from([16, 33, 112]))
def test_every_face_can_be_drawn(seed: int, identity: int, image: int, size: int) -> None:
    """No draw of the parameters leaves the range of a formula (nan, empty window, overflow)."""
    with np.errstate(all="raise", under="ignore"):
        pixels = draw_face(seed, identity, image, size)
    assert pixels.shape == (3, size, size) and pixels.dtype == np.uint8
    assert pixels.std() > 1


def test_the_pictures_are_those_of_before() -> None:
    """Published accuracies rest on all of them, and on the pairs. Processors differ in the last
    digit of a sine, and so in a few pixels by one."""
    faces = SyntheticFaces(3, 4)
    pairs = synthetic_pairs(40, 20, 4, seed=0, first_identity=500)
    for images, expected in zip((all_images(faces), pairs.images), GOLDEN, strict=True):
        pixels = images.flatten().long()
        assert (pixels * (torch.arange(len(pixels)) % 251)).sum() == pytest.approx(expected, 1e-6)
    assert pairs.same.tolist() == 20 * [True, False]


# --- the data set


def test_size_and_order_of_the_data_set_do_not_matter() -> None:
    small, large = SyntheticFaces(3, 4, size=SMALL), SyntheticFaces(9, 4, size=SMALL)
    image, label = large[35]
    assert label == 8 and (image.numpy() == draw_face(0, 8, 3, SMALL)).all()
    image.zero_()  # which does not reach what is kept
    backwards = [large[i][0] for i in reversed(range(len(large)))][::-1]
    assert torch.equal(all_images(small), torch.stack(backwards[:12]))
    later = SyntheticFaces(3, 4, first_identity=6, size=SMALL)
    assert torch.equal(all_images(later), torch.stack(backwards[24:]))


def test_loader_workers_draw_the_same_images() -> None:
    faces = SyntheticFaces(4, 3, size=SMALL)
    assert all_images(faces).any()  # they are kept now
    pickled = pickle.dumps(faces)
    assert len(pickled) < 1000, "it holds pictures"
    batches = list(DataLoader(pickle.loads(pickled), batch_size=5, num_workers=2))
    assert torch.equal(torch.cat([images for images, _ in batches]), all_images(faces))
    assert torch.cat([labels for _, labels in batches]).tolist() == [i // 3 for i in range(12)]


def test_each_image_is_drawn_once_even_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What forked workers drew is there for the parent and for later epochs."""
    faces = SyntheticFaces(4, 3, size=SMALL)
    expected = all_images(SyntheticFaces(4, 3, size=SMALL))
    for _ in DataLoader(faces, num_workers=2, multiprocessing_context="fork"):
        pass
    monkeypatch.delattr("fastface_lightning.data.datasets.synthetic.draw_face")
    assert torch.equal(all_images(faces), expected)


def test_twenty_million_images_take_a_label_and_a_flag_each() -> None:
    """No name, picture or number an image is held: 5 bytes each, twice that while being made."""
    people, each = 1_000_000, 20
    tracemalloc.start()
    try:
        faces = SyntheticFaces(people, each, size=4096)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(faces) == people * each and faces.num_classes == people
    assert faces.labels.nbytes == 4 * people * each and faces.bad.nbytes == people * each
    assert held < 5 * people * each and peak < 9 * people * each
    assert faces._pictures is None, "they do not fit any machine's memory"
    assert faces.identities[-1] == "999999" and faces.labels[-1] == people - 1


def test_a_picture_is_the_same_where_none_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = SyntheticFaces(3, 2, seed=4, size=SMALL)
    monkeypatch.setattr("fastface_lightning.data.datasets.synthetic._machine_memory", lambda: 4)
    anew = SyntheticFaces(3, 2, seed=4, size=SMALL)
    assert kept._pictures is not None and anew._pictures is None
    for _ in range(2):
        assert torch.equal(all_images(kept), all_images(anew))


def test_encoded_is_a_jpeg_near_the_drawing() -> None:
    faces = SyntheticFaces(2, 2)
    for i in range(4):
        data = faces.encoded(i)
        assert is_packable(data, 112)
        error = (decode_image(bytes(data)).float() - faces[i][0].float()).square().mean()
        assert 10 * torch.log10(255**2 / error) > 35  # decibels


@pytest.mark.parametrize("again", [copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_restriction_survives_copies_and_pickles(again) -> None:
    """As a loader's spawned workers get it."""
    faces = SyntheticFaces(5, 2, seed=1, first_identity=10, size=16)
    part = again(faces.restricted(["11", "13", "14"]))
    assert list(part.identities) == ["11", "13", "14"]
    assert part.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(all_images(part), all_images(faces)[[2, 3, 6, 7, 8, 9]])
    assert part.name(2) == "13/0" and part.missing == []
    less = again(part.restricted(["14"]))
    assert list(less.identities) == ["14"] and less.name(1) == "14/1"
    assert torch.equal(all_images(less), all_images(faces)[8:])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_identities", 0),
        ("seed", 2**32),
        ("first_identity", 2**32 - 1),
        ("size", 8),
    ],
)
def test_bad_arguments_are_refused(name: str, value: int) -> None:
    arguments = {"num_identities": 2, "images_per_identity": 2, name: value}
    with pytest.raises(ValueError, match=f"^{name} .*{value}$"):
        SyntheticFaces(**arguments)


# --- verification pairs


def pairs_of(images: torch.Tensor, population: SyntheticFaces) -> list[tuple[int, int]]:
    """Indices in the population of the two images of each pair."""
    index = {population[i][0].numpy().tobytes(): i for i in range(len(population))}
    assert len(index) == len(population)
    found = [index[image.numpy().tobytes()] for image in images]
    return list(zip(found[0::2], found[1::2], strict=True))


def test_pairs_are_what_they_say_distinct_and_balanced_in_every_fold() -> None:
    images, same, _ = synthetic_pairs(100, 10, 5, seed=1, first_identity=500)
    assert images.shape == (200, 3, 112, 112) and images.dtype == torch.uint8
    assert same.shape == (100,) and same.dtype == torch.bool
    pairs = pairs_of(images, SyntheticFaces(10, 5, seed=1, first_identity=500))
    assert [i // 5 == j // 5 for i, j in pairs] == same.tolist()
    assert len({frozenset(pair) for pair in pairs}) == 100
    assert all(i != j for i, j in pairs)
    for fold in same.view(10, 10):
        assert fold.sum() == 5


def test_all_pairs_of_one_person_can_be_sampled() -> None:
    """At the limit (20 pairs of one person in 2 x 5 images) every one of them comes, once."""
    images, same, _ = synthetic_pairs(40, 2, 5)
    pairs = pairs_of(images, SyntheticFaces(2, 5, first_identity=1_000_000))
    sampled = {frozenset(pair) for pair, one in zip(pairs, same.tolist(), strict=True) if one}
    assert sampled == {
        frozenset((a + i, a + j)) for a in (0, 5) for j in range(5) for i in range(j)
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((30, 10, 5), "num_pairs .*30"),
        ((60, 2, 5), "at most 40"),
        ((20, 1, 5), "num_identities"),
        ((20, 10, 1), "images_per_identity"),
    ],
)
def test_bad_pairs_are_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthetic_pairs(*arguments)
