"""Pairs files are read as they are written, and sampled pairs are what they say they are."""

import csv
import os
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastface_lightning.data import (
    FaceList,
    IdentityFolder,
    held_out_pairs,
    interleaved,
    read_pairs,
)
from fastface_lightning.data.pairs import (
    VerificationPairs,
    _sample_different,
    _sample_same,
    pair_files,
    read_verification,
)

Tree = Callable[..., Path]
VIEW_1 = "2\nann\t1\t2\nbob\t2\t1\nann\t1\tbob\t1\nann\t3\tcem\t1\n"
TEN_FOLD = "2 1\nann 1 2\nann 1 bob 1\nbob 2 1\nann 3 cem 1\n"


def read(pairs: VerificationPairs) -> list[tuple[int, int, int, int, bool]]:
    """(person, image, person, image, same) of every pair, from the tree's pixel code."""
    codes = pairs.images[pairs.pairs(), :2, 0, 0].reshape(-1, 4).tolist()
    return [(*code, same) for code, same in zip(codes, pairs.same.tolist(), strict=True)]


def write(folder: Path, text: str) -> Path:
    file = folder / "pairs.txt"
    file.write_text(text)
    return file


def test_view_1_is_interleaved(tree: Tree, tmp_path: Path) -> None:
    root = tree(**{"ann lee": 3, "bob": 2, "cem": 1})
    pairs = read_pairs(write(tmp_path, VIEW_1.replace("ann", "ann lee")), root, size=8)
    assert pairs.images.dtype == torch.uint8 and pairs.images.shape == (8, 3, 8, 8)
    assert pairs.same.dtype == torch.bool and pairs.missing == []
    assert read(pairs) == [
        (0, 1, 0, 2, True), (0, 1, 1, 1, False), (1, 2, 1, 1, True), (0, 3, 2, 1, False)
    ]  # fmt: skip


def test_ten_fold_keeps_the_files_order(tree: Tree, tmp_path: Path) -> None:
    text = "2 2\n" + 2 * "ann 1 2\nbob 1 2\nann 1 bob 1\nann 1 cem 1\n"
    pairs = read_pairs(write(tmp_path, text), tree(ann=3, bob=2, cem=1), size=8)
    assert pairs.same.tolist() == 2 * [True, True, False, False]
    assert read(pairs)[3] == (0, 1, 2, 1, False)


def test_white_space_does_not_matter(tree: Tree, tmp_path: Path) -> None:
    root, file = tree(ann=3, bob=2, cem=1), tmp_path / "pairs.txt"
    for text in (VIEW_1, TEN_FOLD):
        plain = pair_files(write(tmp_path, text), root)
        for other in ("\ufeff" + text.replace("\n", "\r\n"), "\n" + text.replace("\n", " \n\n")):
            file.write_bytes(other.rstrip("\n").encode())
            assert pair_files(file, root) == plain


def test_absent_and_broken_images_lose_their_pairs_only(
    tree: Tree, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tree(ann=3, bob=2, cem=1)
    (root / "bob" / "bob_0002.png").write_bytes(b"")
    (root / "cem" / "cem_0001.png").unlink()
    pairs = read_pairs(write(tmp_path, VIEW_1), root, size=8)
    assert read(pairs) == [(0, 1, 0, 2, True), (0, 1, 1, 1, False)]
    assert len(pairs.missing) == 2
    assert pairs.missing[0].startswith("bob_0002 and bob_0001: cannot read image")
    assert pairs.missing[1].startswith("ann_0003 and cem_0001: cannot read image")
    assert pairs.missing[1].endswith("No such file or directory")
    assert len(caplog.messages) == 1 and "2 of the 4 pairs" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "pairs.txt is empty"),
        ("0\n", "pairs.txt:1: "),
        ("1 2 3\n", "pairs.txt:1: "),
        (bytes(range(128)).decode() * 100, "pairs.txt:1: "),
        ("10 1\nann 1 2\n", "promises 20 pairs in its first line, got 1"),
        ("1\nann 1 2\n\nann one bob 2\n", "pairs.txt:4: "),
        ("1\nann 1 2\nann 1 bob 2 3\n", "pairs.txt:3: "),
        ("1\nann 1 ²\nann 1 bob 2\n", "pairs.txt:2: "),
        ("1\nann 7 8\nann 7 bob 9\n", "none of the 2 pairs"),
        ("a,b,same\n", "holds no pairs"),
        ("path1,path2,label\na,b,1\n", "pairs.txt:1: "),
        ("a,b,1\n\na,b,2\n", "pairs.txt:3: "),
        ("a,b,1\n,b,1\n", "pairs.txt:2: "),
        ('a,b,1\n"a,b,1\n', "pairs.txt:2: "),
        ("a,b,1\n" + "a" * 200_000 + ",b,1\n", "pairs.txt:2: "),
    ],
)
def test_malformed_files_raise_one_sentence(
    tree: Tree, tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_pairs(write(tmp_path, text), tree(ann=2, bob=2))
    assert len(str(caught.value)) < 500


def test_absent_paths_are_named(tree: Tree, tmp_path: Path) -> None:
    file = write(tmp_path, VIEW_1)
    with pytest.raises(ValueError, match="no pairs file"):
        read_pairs(tmp_path / "gone", tree(ann=1))
    with pytest.raises(ValueError, match=r"no folder .*gone"):
        read_pairs(file, tmp_path / "gone")
    with pytest.raises(ValueError, match="size must be at least 1"):
        read_pairs(file, tmp_path, size=0)


def test_lfw_view_1(shared_data: Path) -> None:
    """1000 pairs, one broken by Betsy_Coffin's absence; ten contiguous folds are balanced."""
    lfw = shared_data / "lfw112"
    pairs = read_pairs(lfw / "pairsDevTest.txt", lfw / "images")
    assert pairs.images.shape == (1998, 3, 112, 112)
    assert len(pairs.missing) == 1 and "Betsy_Coffin_0001" in pairs.missing[0]
    for fold in pairs.same.tensor_split(10):
        assert abs(int(fold.sum()) - len(fold) / 2) <= 1


CSV = """a,b,same
ann/ann_0001.png,ann/ann_0002.png,1
ann/ann_0001.png,bob/bob_0001.png,0
bob/bob_0002.png,bob/bob_0001.png,true
ann/ann_0003.png,cem/cem_0001.png,False
"""


@pytest.mark.parametrize(
    "variant",
    [
        lambda text: text.partition("\n")[2].rstrip(),
        lambda text: "\ufeff" + text.replace("\n", "\r\n").replace("a,b,same", "A, B, Same"),
        lambda text: "\n" + text.replace("\n", "\n\n").replace(",", ', "').replace(', "', ", "),
        lambda text: re.sub(r"(\w+/\w+\.png)", r'"\1"', text),
    ],
    ids=["no header", "windows", "blanks", "quoted"],
)
def test_csv_keeps_its_order(
    tree: Tree, tmp_path: Path, caplog: pytest.LogCaptureFixture, variant: Callable[[str], str]
) -> None:
    file = tmp_path / "pairs.csv"
    file.write_bytes(variant(CSV).encode())
    assert read(read_pairs(file, tree(ann=3, bob=2, cem=1), size=8)) == [
        (0, 1, 0, 2, True), (0, 1, 1, 1, False), (1, 2, 1, 1, True), (0, 3, 2, 1, False)
    ]  # fmt: skip
    assert not caplog.messages


def test_csv_of_one_kind_after_the_other_warns(tree: Tree, tmp_path: Path, caplog) -> None:
    """Its tenths are no balanced folds."""
    header, *rows = CSV.splitlines()
    rows.sort(key=lambda row: row.lower().endswith(("0", "false")))
    pairs = read_pairs(write(tmp_path, "\n".join([header, *rows])), tree(ann=3, bob=2, cem=1))
    assert pairs.same.tolist() == [True, True, False, False]
    assert len(caplog.messages) == 1 and "contiguous tenths" in caplog.text


NAMES = st.binary(min_size=1, max_size=20).filter(lambda name: not {*name} & {*b"\0\r\n"})


@given(st.lists(st.tuples(NAMES, NAMES, st.booleans()), min_size=1, max_size=9))
@settings(max_examples=50)
def test_csv_names_survive_whatever_their_bytes(rows: list[tuple[bytes, bytes, bool]]) -> None:
    """Blanks, commas, quotes and bytes that are no text."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "pairs.csv")
        with file.open("w", encoding="utf-8", errors="surrogateescape", newline="") as out:
            table = csv.writer(out, quoting=csv.QUOTE_ALL)
            table.writerows((os.fsdecode(a), os.fsdecode(b), int(same)) for a, b, same in rows)
        found = pair_files(file, folder)
    assert found == [
        (Path(folder, os.fsdecode(a)), Path(folder, os.fsdecode(b)), same) for a, b, same in rows
    ]


def test_absolute_paths_need_no_root(tree: Tree, tmp_path: Path) -> None:
    root = tree(ann=2)
    first, second = root / "ann" / "ann_0001.png", root / "ann" / "ann_0002.png"
    file = write(tmp_path, f"{first},{second},1\n")
    assert pair_files(file) == pair_files(file, tmp_path) == [(first, second, True)]
    assert read(read_verification(file, size=8)) == [(0, 1, 0, 2, True)]
    for text in (f"ann/ann_0001.png,{second},1\n", VIEW_1, TEN_FOLD):
        with pytest.raises(ValueError, match=r"^image_root must be the folder of the images in .*"):
            read_verification(write(tmp_path, text))


@given(st.lists(st.booleans(), max_size=60))
def test_interleaving_is_a_permutation_that_keeps_each_kinds_order(same: list[bool]) -> None:
    order = interleaved(same)
    assert sorted(order) == list(range(len(same)))
    kinds = np.array(same, bool)[order]
    assert (np.diff(order[kinds]) > 0).all() and (np.diff(order[~kinds]) > 0).all()


@given(st.integers(0, 150), st.integers(0, 150), st.integers(1, 12))
def test_any_contiguous_part_has_the_wholes_proportion(n: int, m: int, parts: int) -> None:
    """Of n pairs among n + m, a stretch of length k holds n k / (n + m), to within one or two."""
    same = np.repeat([True, False], [n, m])
    same = same[interleaved(same)]
    for part in np.array_split(same, parts):
        assert abs(part.sum() - len(part) * n / max(n + m, 1)) < 2


COUNTS = st.lists(st.integers(1, 6), min_size=2, max_size=12).filter(lambda c: max(c) > 1)


@given(COUNTS, st.integers(1, 40), st.integers(0, 2**32))
def test_sampled_pairs_are_distinct_and_of_their_kind(counts: list[int], n: int, seed: int) -> None:
    """Up to the last pair there is; nobody gives two more than one who could give more."""
    labels = np.repeat(np.arange(len(counts)), counts)
    i, j = np.triu_indices(len(labels), 1)
    sizes = np.array(counts)
    for sample, of_kind in [
        (_sample_same, labels[i] == labels[j]),
        (_sample_different, labels[i] != labels[j]),
    ]:
        wanted = min(n, int(of_kind.sum()))
        sampled = sample(sizes, wanted, np.random.default_rng(seed))
        possible = set(zip(i[of_kind], j[of_kind], strict=True))
        assert sampled.shape == (wanted, 2)
        assert len({tuple(pair) for pair in sampled} & possible) == wanted
        if sample is _sample_same:
            given_ = np.bincount(labels[sampled[:, 0]], minlength=len(sizes))
            could = given_ < sizes * (sizes - 1) // 2
            assert not could.any() or given_.max() - given_[could].min() <= 1


def test_different_pairs_are_uniform() -> None:
    """Of three people with 1, 2 and 3 images, each of the 11 pairs is sampled equally often."""
    sampled = [
        tuple(_sample_different(np.array([1, 2, 3]), 1, np.random.default_rng(seed))[0])
        for seed in range(1100)
    ]
    frequency = np.unique(sampled, axis=0, return_counts=True)[1]
    assert len(frequency) == 11 and (abs(frequency - 100) < 5 * np.sqrt(100)).all()


def test_held_out_pairs_are_interleaved_and_reproducible(tree: Tree) -> None:
    dataset = IdentityFolder(tree(ann=3, bob=2, cem=1), size=8)
    pairs = held_out_pairs(dataset, 6, seed=1)
    assert pairs.same.tolist() == 3 * [True, False]
    assert len(pairs.images) == 6 and pairs.index is not None  # each image once
    again = held_out_pairs(dataset, 6, seed=1)
    assert torch.equal(pairs.images, again.images) and torch.equal(pairs.index, again.index)
    assert read(pairs) != read(held_out_pairs(dataset, 6, seed=2))


def test_held_out_pairs_are_as_many_as_there_are(tree: Tree) -> None:
    """Of four images all six pairs; a bad image loses its pairs, and is never replaced in one."""
    root = tree(ann=3, bob=1)
    pairs = held_out_pairs(IdentityFolder(root, size=8), 100)
    assert sorted(read(pairs)) == [
        (0, 1, 0, 2, True), (0, 1, 0, 3, True), (0, 1, 1, 1, False),
        (0, 2, 0, 3, True), (0, 2, 1, 1, False), (0, 3, 1, 1, False),
    ]  # fmt: skip
    (root / "ann" / "ann_0003.png").write_bytes(b"")
    fewer = held_out_pairs(IdentityFolder(root, size=8), 100)
    assert len(fewer.missing) == 3 and set(read(fewer)) < set(read(pairs))


def test_impossible_samples_are_refused(tree: Tree) -> None:
    root = tree(ann=2, bob=1, cem=1)
    with pytest.raises(ValueError, match="num_pairs must be even and at least 2, got 3"):
        held_out_pairs(IdentityFolder(root), 3)
    with pytest.raises(ValueError, match="need two images of someone"):
        held_out_pairs(IdentityFolder(root, identities=["bob", "cem"]), 2)
    with pytest.raises(ValueError, match=r"need two people in .*, got 1"):
        held_out_pairs(IdentityFolder(root, identities=["ann"]), 2)


def test_held_out_pairs_of_an_unsorted_source(tree: Tree) -> None:
    """Lists, archives and record files need not lie person by person."""
    root = tree(ann=3, bob=3, cem=3, dan=3)
    files = sorted(root.rglob("*.png"))
    order = np.random.default_rng(0).permutation(len(files))
    lines = [f"{files[i].relative_to(root)},{files[i].parent.name}\n" for i in order]
    (root / "list.csv").write_text("".join(lines))
    pairs = held_out_pairs(FaceList(root / "list.csv", size=8), 20)
    people = pairs.images[pairs.pairs(), 0, 0, 0]
    assert torch.equal(people[:, 0] == people[:, 1], pairs.same) and len(pairs.same) == 20
