"""Names in one block of bytes are the list of strings they stand for."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastface_lightning.data.formats.names import (
    Labels,
    Names,
    jpeg_name,
    read_names,
    write_names,
)

# What a file system may hold: any bytes but the slash and nought.
file_names = st.binary(max_size=12).map(lambda b: os.fsdecode(b.translate(None, b"/\0")))


@given(st.lists(file_names, max_size=20), st.data())
def test_they_are_the_list(names: list[str], data: st.DataObject) -> None:
    packed = Names.of(iter(names))
    assert len(packed) == len(names) and list(packed) == names and packed == names
    part = data.draw(st.slices(len(names)))
    assert packed[part] == names[part]
    for i in range(-len(names), len(names)):
        assert packed[i] == names[i]
    for i in (len(names), -len(names) - 1):
        with pytest.raises(IndexError, match=rf"^index must lie in \[0, {len(names)}\), got {i}$"):
            packed[i]


@given(st.lists(file_names, max_size=20))
def test_their_arrays_bring_them_back(names: list[str]) -> None:
    arrays = {**Names.of(names).arrays("files"), **Names.of(["x"]).arrays("people")}
    assert Names.from_arrays("files", arrays) == names
    assert Names.from_arrays("people", arrays) == ["x"]


@given(st.lists(file_names, max_size=30))
def test_labels_are_numpys(names: list[str]) -> None:
    labels = Labels()
    for name in names:
        labels.append(name)
    identities, numbers = labels.sorted()
    assert list(identities) == sorted(set(names)) and numbers.dtype == np.int32
    assert [identities[i] for i in numbers] == names


@given(
    st.sets(
        st.lists(st.sampled_from(["a", ".jpg", ".JPG", ".png"]), min_size=1, max_size=4)
        .map("".join)
        .filter(lambda name: name.lower().endswith((".jpg", ".png")) and name[0] != "."),
        max_size=12,
    )
)
def test_no_two_images_of_a_folder_share_a_jpegs_name(names: set[str]) -> None:
    made = {jpeg_name(name) for name in names}
    assert len(made) == len(names) and all(name.endswith(".jpg") for name in made)


def test_a_file_of_names_keeps_every_byte_and_its_lines(tmp_path: Path) -> None:
    names = ["ann", os.fsdecode(b"\xff\xe9"), "陈 \u2028 ü", "", "two\nlines"]
    write_names(tmp_path / "names.txt", names)
    assert read_names(tmp_path / "names.txt") == [*names[:4], "two\\nlines"]
    assert [file.name for file in tmp_path.iterdir()] == ["names.txt"]
