"""A record file as a training set: order, labels, workers, and what damage costs."""

import pickle
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastface_lightning.data import RecordDataset, encode_jpeg
from fastface_lightning.data.datasets import records
from fastface_lightning.data.datasets.base import collate
from fastface_lightning.data.formats.names import write_names
from fastface_lightning.data.formats.recordio import read_table
from fastface_lightning.data.formats.recordio_writer import (
    InsightFaceWriter,
    encode_record,
    pack_image,
)


@pytest.fixture
def rec(tmp_path: Path) -> Path:
    """Labels 3, 3, 5, 9, 9, 9; image i is everywhere about (40 i, 10, 200)."""
    with InsightFaceWriter(tmp_path / "train.rec") as writer:
        for i, label in enumerate([3, 3, 5, 9, 9, 9]):
            writer.write_image(label, encode_jpeg(np.full((8, 8, 3), (40 * i, 10, 200), np.uint8)))
    return tmp_path / "train.rec"


def write_plain(path: Path, payloads: dict[int, bytes]) -> Path:
    """A pack of records by key, without InsightFace's header."""
    data, lines = b"", ""
    for key, payload in payloads.items():
        lines += f"{key}\t{len(data)}\n"
        data += encode_record(payload)
    path.write_bytes(data)
    path.with_suffix(".idx").write_text(lines)
    return path


def numbers(images: torch.Tensor) -> list[int]:
    return [round(int(image[0, 0, 0]) / 40) for image in images]


def test_files_of_others_are_read(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "fixtures" / "recordio"
    for name in ("train.rec", "train.idx"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    dataset = RecordDataset(tmp_path / "train.rec")
    lines = sorted(line.split("\t") for line in (source / "train.lst").read_text().splitlines())
    assert len(dataset) == 8 and dataset.num_classes == 2
    for i, (key, label, name) in enumerate(lines):
        image, found = dataset[i]
        assert (int(key), int(float(label))) == (i, found) and type(found) is int
        assert image.shape == (3, 112, 112) and image.dtype == torch.uint8
        assert dataset.encoded(i) == (source / Path(name).name).read_bytes()
    (tmp_path / "train.idx").unlink()
    again = RecordDataset(tmp_path / "train.rec")
    assert sorted(again.labels.tolist()) == dataset.labels.tolist()


def test_records_are_served_by_ascending_key_and_named_by_their_labels(tmp_path: Path) -> None:
    keys = [30, 4, 21, 107, 5]
    payloads = {key: pack_image(key, key, b"image %d" % key) for key in keys}
    dataset = RecordDataset(write_plain(tmp_path / "a.rec", payloads))
    assert [bytes(dataset.encoded(i)) for i in range(5)] == [b"image %d" % k for k in sorted(keys)]
    assert list(dataset.identities) == ["4", "5", "21", "30", "107"]


def test_labels_are_numbered_anew_and_keep_their_names(rec: Path) -> None:
    dataset = RecordDataset(rec, size=8)
    assert dataset.labels.tolist() == [0, 0, 1, 2, 2, 2]
    assert dataset.identities == ["3", "5", "9"]
    assert numbers(torch.stack([dataset[i][0] for i in range(6)])) == list(range(6))
    some = dataset.restricted(["9", "3"])
    assert some.identities == ["3", "9"] and some.labels.tolist() == [0, 0, 1, 1, 1]
    assert [numbers(some[i][0][None]) for i in range(5)] == [[0], [1], [3], [4], [5]]
    assert dataset.restricted(min_images=3).identities == ["9"]


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_in_place(rec: Path, context: str) -> None:
    dataset = RecordDataset(rec, size=8)
    assert len(pickle.dumps(dataset)) < 3000
    loader = DataLoader(
        dataset, 4, num_workers=2, collate_fn=collate, multiprocessing_context=context
    )
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert numbers(images) == list(range(6)) and labels.tolist() == [0, 0, 1, 2, 2, 2]
    assert labels.dtype == torch.int64


def test_damage_is_named_counted_and_kept_in_mind(
    rec: Path, caplog: pytest.LogCaptureFixture
) -> None:
    offsets = [
        int(line.split("\t")[1]) for line in rec.with_suffix(".idx").read_text().split("\n")[:7]
    ]
    data = bytearray(rec.read_bytes())
    data[offsets[2]] ^= 1  # the magic number of image 1
    data[offsets[4] + 8 + 24 + 30] ^= 0xFF  # the JPEG of image 3
    data[offsets[4] + 8 + 24] = 0
    rec.write_bytes(data)
    for _ in range(2):  # found, then read from the index
        caplog.clear()
        dataset = RecordDataset(rec, size=8)
        assert len(dataset) == 5 and len(dataset.damaged) == 1
        assert f"at offset {offsets[2]}" in caplog.text
        images = torch.stack([dataset[i][0] for i in range(5)])
        assert numbers(images) == [0, 2, 4, 4, 5]
        assert dataset.bad_images() == [f"at byte {offsets[4]} of {rec}"]
        assert f"at byte {offsets[4]} of" in caplog.text
    with pytest.raises(ValueError, match=r"at most max_bad = 0 images may be unreadable, got 1"):
        RecordDataset(rec, size=8, max_bad=0)


def test_an_incomplete_copy_says_so(rec: Path) -> None:
    rec.write_bytes(rec.read_bytes()[:1500])
    assert 0 < len(RecordDataset(rec, size=8)) < 6
    with pytest.raises(ValueError, match=r"max_bad = 1 .* ends at byte 1500, .* incomplete copy"):
        RecordDataset(rec, size=8, max_bad=1)  # as kept


def test_the_file_is_looked_at_once_until_it_changes(
    rec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = Mock(side_effect=read_table)
    monkeypatch.setattr(records, "read_table", looked)
    assert [len(RecordDataset(rec, size=8)) for _ in range(3)] == [6, 6, 6]
    assert looked.call_count == 1 and rec.with_name("train.rec.index").exists()
    index = rec.with_suffix(".idx")
    index.write_text("".join(line + "\n" for line in index.read_text().splitlines()[:5]))
    assert [len(RecordDataset(rec, size=8)) for _ in range(2)] == [4, 4]
    assert looked.call_count == 2
    RecordDataset(rec, size=8, reindex=True)
    assert looked.call_count == 3
    write_plain(rec, {0: pack_image(7, 0, b"x")})
    assert RecordDataset(rec, size=8).identities == ["7"] and looked.call_count == 4


def test_names_beside_the_file_are_the_identities(rec: Path) -> None:
    names = [f"person {i}" for i in range(10)]
    write_names(rec.with_suffix(".identities.txt"), names)
    assert RecordDataset(rec, size=8).identities == ["person 3", "person 5", "person 9"]
    write_names(rec.with_suffix(".identities.txt"), names[:9])
    with pytest.raises(ValueError, match=r"identities\.txt must name label 9, got 9 names"):
        RecordDataset(rec, size=8)
