"""What the writer leaves: InsightFace's layout, whole or to be resumed to the same bytes."""

import errno
import os
import random
import resource
import struct
from pathlib import Path
from typing import cast
from unittest.mock import Mock

import pytest

from fastface_lightning.data.formats import recordio_writer
from fastface_lightning.data.formats.recordio import MAGIC, RecordFile, read_idx, read_table
from fastface_lightning.data.formats.recordio_writer import (
    InsightFaceWriter,
    encode_record,
    pack_image,
)

WORD = struct.pack("<I", MAGIC)


@pytest.fixture
def rec(tmp_path: Path) -> Path:
    return tmp_path / "train.rec"


def part_of(rec: Path) -> Path:
    return rec.with_name("train.rec.part")


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir())


def contents(rec: Path) -> tuple[bytes, bytes]:
    return rec.read_bytes(), rec.with_suffix(".idx").read_bytes()


def complete(path: Path, images: list[bytes], resume: bool = False) -> int:
    """Write what is missing; returns how many images were there."""
    with InsightFaceWriter(path, resume) as writer:
        kept = len(writer)
        for i in range(kept, len(images)):
            assert writer.write_image(i // 3, images[i], id2=7 * i) == i + 1
        assert len(writer) == len(images)
    return kept


def write_and_fail(writer: InsightFaceWriter, images: list[bytes]) -> None:
    with writer:
        for i, image in enumerate(images):
            writer.write_image(i // 3, image, id2=7 * i)
        raise KeyError


def test_insightface_layout(rec: Path, caplog: pytest.LogCaptureFixture) -> None:
    with InsightFaceWriter(rec) as writer:
        for label in (2, 2, 5, 7, 7, 7):
            writer.write_image(label, b"x")
    file, (keys, offsets) = RecordFile(rec), read_idx(rec.with_suffix(".idx"))
    assert keys.tolist() == list(range(10))
    records = [file.image_record(offset) for offset in offsets]
    assert [record.id for record in records] == keys.tolist()
    assert [record.flag for record in records] == [2, 0, 0, 0, 0, 0, 0, 2, 2, 2]
    assert records[0].labels == (7, 10)
    assert [record.labels for record in records[7:]] == [(1, 3), (3, 4), (4, 7)]
    table = read_table(rec)
    assert table.keys.tolist() == [1, 2, 3, 4, 5, 6]
    assert table.labels.tolist() == [2, 2, 5, 7, 7, 7]
    assert not caplog.messages


def test_names_appear_only_on_closing(rec: Path) -> None:
    with InsightFaceWriter(rec) as writer:
        writer.write_image(1, b"x")
        assert names(rec) == ["train.rec.part"]
    assert names(rec) == ["train.idx", "train.rec"]
    writer.close()  # once more does nothing
    with pytest.raises(ValueError, match="closed file"):
        writer.write_image(1, b"")


def test_exception_leaves_a_part_that_resumes(rec: Path) -> None:
    images = [bytes([i]) * i for i in range(10)]
    complete(rec.with_name("all.rec"), images)
    with pytest.raises(KeyError):
        write_and_fail(writer := InsightFaceWriter(rec), images[:6])
    assert names(rec) == ["all.idx", "all.rec", "train.rec.part"]
    with pytest.raises(ValueError, match="closed file"):
        writer.close()
    with pytest.raises(ValueError, match="left of an earlier run"):
        InsightFaceWriter(rec)
    assert complete(rec, images, resume=True) == 6
    assert contents(rec) == contents(rec.with_name("all.rec"))


def test_killed_at_any_moment_it_resumes_to_the_same_bytes(rec: Path) -> None:
    """The part as it is on disk after a kill: cut anywhere, while images or identities came."""
    rng = random.Random(0)
    images = [rng.randbytes(rng.randrange(9)) + WORD * rng.randrange(3) for _ in range(12)]
    assert complete(rec, images, resume=True) == 0  # nothing there: a start
    data, index = contents(rec)
    offsets = [*read_idx(rec.with_suffix(".idx"))[1].tolist(), len(data)]
    for size in range(0, len(data), 9):
        for file in (rec, rec.with_suffix(".idx")):
            file.unlink()
        part_of(rec).write_bytes(data[:size])
        images_there = sum(end <= size for end in offsets[1:]) - 1
        with InsightFaceWriter(rec, resume=True) as writer:
            kept = len(writer)
            assert kept == min(max(images_there, 0), len(images))
            assert writer.id2.tolist() == [7 * i for i in range(kept)]
            for i in range(kept, len(images)):
                writer.write_image(i // 3, images[i], id2=7 * i)
        assert contents(rec) == (data, index)


def test_close_that_was_interrupted_between_the_names_resumes(rec: Path) -> None:
    images = [b"a", b"bc", b"def"]
    complete(rec, images)
    data, index = contents(rec)
    rec.rename(part_of(rec))
    with pytest.raises(ValueError, match="left of an earlier run"):
        InsightFaceWriter(rec)
    assert complete(rec, images, resume=True) == 3
    assert contents(rec) == (data, index)
    assert names(rec) == ["train.idx", "train.rec"]


def test_resuming_drops_what_is_damaged(rec: Path) -> None:
    """As after a power cut: the size is there, the bytes are not."""
    images = [b"abcd" * 5] * 6
    complete(rec, images)
    data, index = contents(rec)
    third = int(read_idx(rec.with_suffix(".idx"))[1][3])
    rec.with_suffix(".idx").unlink()
    rec.rename(part_of(rec))
    part_of(rec).write_bytes(data[:third] + bytes(20) + data[third + 20 :])
    assert complete(rec, images, resume=True) == 2
    assert contents(rec) == (data, index)


def test_resuming_another_layout_is_refused(rec: Path) -> None:
    part_of(rec).write_bytes(encode_record(pack_image(1, 0, b"x")))
    with pytest.raises(ValueError, match="header record"):
        InsightFaceWriter(rec, resume=True)


@pytest.mark.parametrize("suffix", [".rec", ".idx"])
def test_nothing_is_overwritten(rec: Path, suffix: str) -> None:
    rec.with_suffix(suffix).write_text("precious")
    for resume in (False, True):
        with pytest.raises(ValueError, match="must be new"):
            InsightFaceWriter(rec, resume=resume)
    assert rec.with_suffix(suffix).read_text() == "precious"


def test_full_disk_is_named_and_leaves_what_resumes(
    rec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system refuses bytes beyond a limit, within a record."""
    monkeypatch.setattr(recordio_writer, "_BUFFER", 4096)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_001, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*train\.rec\.part") as error:
            write_and_fail(InsightFaceWriter(rec), [bytes(1000)] * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG
    assert names(rec) == ["train.rec.part"]
    assert 12 < complete(rec, [bytes(1000)] * 30, resume=True) < 20
    assert read_table(rec).labels.tolist() == [i // 3 for i in range(30)]


def test_bad_arguments_are_refused(rec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with InsightFaceWriter(rec) as writer:
        writer.write_image(5, b"x")
        with pytest.raises(ValueError, match="ascending label, got 4 after 5"):
            writer.write_image(4, b"x")
        for label in (1 << 24, 5.5):
            with pytest.raises(ValueError, match="label must be a whole number"):
                writer.write_image(cast(int, label), b"x")
        monkeypatch.setattr(recordio_writer, "TOO_LONG", 1000)
        with pytest.raises(ValueError, match="shorter than"):
            writer.write_image(5, bytes(976))
        writer.write_image(5, bytes(975))
    assert read_table(rec).labels.tolist() == [5, 5]


def test_swallowed_error_gives_no_name(rec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = InsightFaceWriter(rec)
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(writer._rec, "write", full)
    with pytest.raises(OSError, match=r"cannot write .*rec\.part"):
        writer.write_image(0, bytes(100))
    with pytest.raises(ValueError):
        writer.close()
    assert names(rec) == ["train.rec.part"]


def test_index_gets_its_name_before_its_records(rec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So where there is a ``.rec``, everything is there."""
    order: list[str] = []
    replace = os.replace

    def watched(source: Path, target: Path) -> None:
        order.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    complete(rec, [b"abcd"])
    assert order == ["train.idx", "train.rec"]
