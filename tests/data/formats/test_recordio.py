"""Record files are read as MXNet wrote them and written as it would; damage is reported."""

import errno
import logging
import multiprocessing
import os
import pickle
import random
import re
import resource
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastface_lightning.data.formats import recordio
from fastface_lightning.data.formats.recordio import (
    MAGIC,
    InsightFaceWriter,
    RecordFile,
    RecordTable,
    RecordWriter,
    _agreeing,
    _blocks_of_lines,
    _digits,
    _encode,
    _is_count,
    _sound_records,
    pack_image,
    parse_image_record,
    read_idx,
    read_table,
)

WORD = struct.pack("<I", MAGIC)


def raw(flag: int, part: bytes, length: int | None = None) -> bytes:
    """One part, byte by byte as the format says."""
    size = len(part) if length is None else length
    return WORD + struct.pack("<I", flag << 29 | size) + part + bytes(-len(part) % 4)


def slow_encode(payload: bytes) -> bytes:
    """The plain twin of the writer: look at every fourth byte."""
    parts, start = [], 0
    for i in range(0, len(payload) - 3, 4):
        if payload[i : i + 4] == WORD:
            parts.append(payload[start:i])
            start = i + 4
    parts.append(payload[start:])
    if len(parts) == 1:
        return raw(0, parts[0])
    return b"".join(raw(1 if k == 0 else 2, part) for k, part in enumerate(parts[:-1])) + raw(
        3, parts[-1]
    )


def slow_table(path: Path) -> list[tuple[int, int, int]]:
    """(key, offset, label) of all images by key: the plain twin of the table."""
    file, rows = RecordFile(path), []
    for line in path.with_suffix(".idx").read_text().splitlines():
        key, offset = map(int, line.split("\t"))
        flag, label = struct.unpack_from("<If", payload := bytes(file.record(offset)))
        labels = struct.unpack_from(f"<{flag}f", payload, 24) if flag else (label,)
        if not flag or len(payload) > 24 + 4 * flag:
            rows.append((key, offset, int(labels[0])))
    return sorted(rows)


def rows(table: RecordTable) -> list[tuple[int, int, int]]:
    return list(zip(*(column.tolist() for column in table[:3]), strict=True))


def write(path: Path, payloads: list[bytes], keys: list[int] | None = None) -> Path:
    with RecordWriter(path) as writer:
        for i, payload in enumerate(payloads):
            writer.write(payload, i if keys is None else keys[i])
    return path


def write_insightface(path: Path, labels: list[int], image: bytes = b"image") -> Path:
    with InsightFaceWriter(path) as writer:
        for label in labels:
            writer.write_image(label, image + bytes([label % 251]))
    return path


@pytest.fixture
def rec(tmp_path: Path) -> Path:
    return tmp_path / "train.rec"


@pytest.fixture
def pack(shared_data: Path) -> Path:
    """Eight faces, packed by MXNet's own im2rec."""
    return shared_data / "fixtures" / "recordio"


# Files made by MXNet


def test_records_are_the_files_that_were_packed(pack: Path) -> None:
    file = RecordFile(pack / "train.rec")
    lines = [line.split("\t") for line in (pack / "train.lst").read_text().splitlines()]
    expected = sorted((int(key), int(label), Path(name).name) for key, label, name in lines)
    table = read_table(pack / "train.rec")
    assert len(expected) == 8
    for (key, offset, label), (want_key, want_label, name) in zip(
        rows(table), expected, strict=True
    ):
        record = file.image_record(offset)
        assert (key, label) == (want_key, want_label) == (record.id, record.labels[0])
        assert record.flag == 0 and record.labels.dtype == np.float32
        assert bytes(record.image) == (pack / name).read_bytes()
    assert rows(table) == slow_table(pack / "train.rec")


def test_index_is_read_in_the_files_order(pack: Path) -> None:
    keys, offsets = read_idx(pack / "train.idx")
    assert keys.dtype == offsets.dtype == np.int64
    assert keys.tolist() == [0, 4, 7, 5, 1, 6, 3, 2]
    assert offsets.tolist() == _sound_records(RecordFile(pack / "train.rec")).tolist()
    assert offsets.tolist() == [0, 5500, 11228, 16648, 21660, 26504, 33296, 38568]


def test_rewriting_gives_the_same_bytes(pack: Path, rec: Path) -> None:
    file = RecordFile(pack / "train.rec")
    with RecordWriter(rec) as writer:
        for key, offset in zip(*read_idx(pack / "train.idx"), strict=True):
            image = file.image_record(offset)
            payload = pack_image(float(image.labels[0]), image.id, image.image)
            assert payload == file.record(offset)
            writer.write(payload, key)
    assert rec.read_bytes() == (pack / "train.rec").read_bytes()
    assert rec.with_suffix(".idx").read_bytes() == (pack / "train.idx").read_bytes()


# Reading records


def test_split_record_as_the_format_says(rec: Path) -> None:
    rec.write_bytes(
        raw(0, b"whole")
        + (WORD + b"\x04\x00\x00\x20" + b"abcd")  # first part, 4 bytes
        + (WORD + b"\x00\x00\x00\x40")  # middle part, empty
        + (WORD + b"\x03\x00\x00\x60" + b"xyz\x00")  # last part, 3 bytes
        + raw(0, b"")
    )
    file = RecordFile(rec)
    assert _sound_records(file).tolist() == [0, 16, 48]
    assert bytes(file.record(16)) == b"abcd" + WORD + WORD + b"xyz"
    assert file.record(0) == b"whole" and file.record(48) == b""


def test_whole_records_are_views_that_cannot_be_written(rec: Path) -> None:
    payload = RecordFile(write(rec, [b"abcd"])).record(0)
    assert payload.readonly and payload.obj is not None and not isinstance(payload.obj, bytes)


seeded = st.lists(
    st.one_of(st.just(WORD), st.binary(max_size=6), st.just(WORD[:2]), st.just(bytes(4))),
    max_size=12,
).map(b"".join)


@given(payload=seeded)
def test_splitting_agrees_with_the_plain_twin(payload: bytes) -> None:
    encoded = _encode(payload)
    assert encoded == slow_encode(payload)
    assert len(encoded) % 4 == 0
    assert _encode(memoryview(payload)) == encoded


@given(payloads=st.lists(seeded, min_size=1, max_size=6))
def test_what_is_written_is_read(
    payloads: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(tmp_path_factory.mktemp("split") / "a.rec", payloads)
    file, (keys, offsets) = RecordFile(path), read_idx(path.with_suffix(".idx"))
    assert keys.tolist() == list(range(len(payloads)))
    assert _sound_records(file).tolist() == offsets.tolist()
    assert [bytes(file.record(offset)) for offset in offsets] == payloads


def digest(file: RecordFile) -> bytes:
    return b"".join(bytes(file.record(offset)) for offset in _sound_records(file))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_it(rec: Path, method: str) -> None:
    file = RecordFile(write(rec, [b"one", b"two!"]))
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(digest, (file,)) == b"onetwo!"
    again = pickle.loads(pickle.dumps(file))
    assert again.path == rec and digest(again) == b"onetwo!"


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (raw(0, b"abcd") + b"\x00" * 12, "must begin with the magic number 0xced7230a"),
        (raw(0, b"abcd") + raw(2, b"ab"), "first part .* must have flag 0 or 1, got 2"),
        (raw(0, b"abcd") + raw(3, b"ab"), "first part .* must have flag 0 or 1, got 3"),
        (raw(0, b"abcd") + raw(7, b"ab"), "first part .* must have flag 0 or 1, got 7"),
        (raw(0, b"abcd") + raw(1, b"ab") + raw(0, b"c"), "next part .* flag 2 or 3, got 0"),
        (raw(0, b"abcd") + raw(1, b"ab") + raw(1, b"c"), "next part .* flag 2 or 3, got 1"),
        (raw(0, b"abcd") + raw(1, b"ab"), "must end within the file's 24 bytes"),
        (raw(0, b"abcd") + raw(0, b"ab", 5), "must end within the file's 24 bytes, got 5"),
        (raw(0, b"abcd") + raw(0, b"ab", (1 << 29) - 1), "got 536870911 bytes of payload"),
        (raw(0, b"abcd") + raw(1, b"") + raw(3, b"", (1 << 29) - 4), "shorter than 2\\^29"),
    ],
)
def test_faulty_records_are_named(rec: Path, data: bytes, rule: str) -> None:
    rec.write_bytes(data)
    file = RecordFile(rec)
    assert file.record(0) == b"abcd"
    with pytest.raises(ValueError, match=rule) as error:
        file.record(12)
    assert str(rec) in str(error.value) and " 12" in str(error.value)


@pytest.mark.parametrize("offset", [-4, -1, 1, 2, 3, 6, 8, 12, 1 << 40, 1 << 70])
def test_offsets_outside_are_refused(rec: Path, offset: int) -> None:
    file = RecordFile(write(rec, [b"abc"]))
    with pytest.raises(ValueError, match=r"must be multiples of 4 in \[0, 4\], got|magic"):
        file.record(offset)


def test_files_that_are_none_are_refused(tmp_path: Path, rec: Path) -> None:
    with pytest.raises(ValueError, match=r"no record file .*train\.rec"):
        RecordFile(rec)
    with pytest.raises(ValueError, match="no record file"):
        RecordFile(tmp_path)
    rec.touch()
    with pytest.raises(ValueError, match=r"train\.rec must hold records, got an empty file"):
        RecordFile(rec)


# Image records


def test_image_record_with_and_without_labels_of_its_own() -> None:
    plain = parse_image_record(pack_image(7, 1 << 63, b"jpeg"))
    assert (plain.flag, plain.labels.tolist(), plain.id) == (0, [7.0], 1 << 63)
    assert plain.image == b"jpeg"
    listed = parse_image_record(pack_image([3, 1.5], 9, b"jpeg"))
    assert (listed.flag, listed.labels.tolist(), listed.id) == (2, [3.0, 1.5], 9)
    assert listed.image == b"jpeg"
    assert pack_image([3], 9, b"")[:4] == b"\x01\x00\x00\x00"
    assert pack_image(2, 3, b"x") == struct.pack("<IfQQ", 0, 2, 3, 0) + b"x"


@pytest.mark.parametrize("size", [0, 1, 23])
def test_short_image_record_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"at least 24 bytes, got {size}"):
        parse_image_record(bytes(size))


@pytest.mark.parametrize("bit", range(32))
def test_flipped_flag_allocates_nothing(bit: int) -> None:
    payload = bytearray(pack_image(1, 2, bytes(3)))
    payload[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError, match=f"with {1 << bit} labels must hold at least"):
        parse_image_record(bytes(payload))


@pytest.mark.parametrize("label", [float("nan"), float("inf"), 1e39, [], [[1.0]], [1, 1e39]])
def test_labels_that_are_no_float32_are_refused(label: Any) -> None:
    with pytest.raises(ValueError, match="finite float32"):
        pack_image(label, 0, b"")


@pytest.mark.parametrize("id", [-1, 1 << 64])
def test_ids_out_of_range_are_refused(id: int) -> None:
    with pytest.raises(ValueError, match=r"id must lie in \[0, 2\^64\), got"):
        pack_image(0, id, b"")


# The index


def test_white_space_of_other_writers_passes(tmp_path: Path) -> None:
    file = tmp_path / "a.idx"
    for text in ("0\t0\n1\t8", "0\t0\r\n1\t8\r\n", "0\t0\n\n1\t8\n\n", " 0\t0 \n1 8\n"):
        file.write_bytes(text.encode())
        keys, offsets = read_idx(file)
        assert (keys.tolist(), offsets.tolist()) == ([0, 1], [0, 8])
    file.write_bytes(b"")
    assert [column.shape for column in read_idx(file)] == [(0,), (0,)]


@pytest.mark.parametrize(
    "line",
    ["1", "1\t", "\t1", "1\t2\t3", "a\t1", "1\t-4", "1\t2.0", "1\t0x4", "1\t" + 19 * "9", "\0"],
)
def test_malformed_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "a.idx"
    file.write_text(f"0\t0\n5\t8\n{line}\n6\t16\n")
    with pytest.raises(ValueError, match=r"a\.idx:3: expected a record's key, a tab") as error:
        read_idx(file)
    assert repr(line) in str(error.value)


def test_lines_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastface_lightning.data.formats.recordio._TEXT_BLOCK", 50)
    file, numbers = tmp_path / "a.idx", np.arange(500)
    text = "".join(f"{i}\t{i**4}\n" for i in numbers)
    file.write_text(text)
    keys, offsets = read_idx(file)
    assert (keys == numbers).all() and (offsets == numbers**4).all()
    file.write_text(text + "x\n")
    with pytest.raises(ValueError, match=r"a\.idx:501: "):
        read_idx(file)
    file.write_bytes(bytes(1000))  # no line at all
    with open(file, "rb") as opened:
        assert max(map(len, _blocks_of_lines(opened))) == 50
    with pytest.raises(ValueError, match=r"a\.idx:1: "):
        read_idx(file)
    with pytest.raises(ValueError, match=r"cannot read .*: No such file"):
        read_idx(tmp_path / "b.idx")


@given(st.lists(st.integers(0, 10**18 - 1), min_size=1))
def test_digits(numbers: list[int]) -> None:
    edges = [10**k - d for k in range(1, 18) for d in (0, 1)]
    found = _digits(np.array(numbers + edges, np.int64))
    assert found.tolist() == [len(str(number)) for number in numbers + edges]


# Tables


def mixed(path: Path, seed: int = 0, count: int = 200) -> Path:
    """Image records with and without labels of their own, split ones among them, shuffled keys."""
    rng = random.Random(seed)
    payloads = []
    keys = rng.sample(range(10 * count), count)
    for key in keys:
        label = rng.randrange(50)
        image = rng.randbytes(rng.randrange(20)) + b"".join(
            rng.choice([WORD, b"zzzz"]) for _ in range(rng.randrange(3))
        )
        labels: list[float | list[float]] = [label, [label], [label, 1]]
        payloads.append(pack_image(rng.choice(labels), key, image))
    return write(path, payloads, keys)


@pytest.mark.parametrize("block", [1, 7, 1 << 16])
@pytest.mark.parametrize("make", [mixed, lambda path: write_insightface(path, [0, 0, 3, 3, 4])])
def test_table_agrees_with_the_plain_twin(
    rec: Path, block: int, make: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastface_lightning.data.formats.recordio._BLOCK", block)
    calls: list[tuple[int, int]] = []
    table = read_table(make(rec), progress=lambda done, total: calls.append((done, total)))
    assert [column.dtype for column in table[:3]] == 3 * [np.int64]
    assert rows(table) == slow_table(rec)
    assert calls == sorted(calls) and calls[-1] == 2 * (rec.stat().st_size,)
    again = read_table(rec, reindex=True)
    rec.with_suffix(".idx").unlink()
    assert rows(again) == rows(read_table(rec)) == rows(table)


def test_head_split_by_the_magic_number(rec: Path) -> None:
    payload = struct.pack("<IfQQ", 0, 5, MAGIC << 32 | MAGIC, MAGIC) + WORD + b"image"
    assert rows(read_table(write(rec, [payload, pack_image(2, 1, b"x")]))) == [
        (0, 0, 5),
        (1, len(slow_encode(payload)), 2),
    ]


def test_without_index_and_distinct_ids_places_are_keys(rec: Path) -> None:
    write(rec, [pack_image(label, 0, b"x") for label in (4, 5, 6)], keys=[9, 8, 7])
    assert [row[::2] for row in rows(read_table(rec))] == [(7, 6), (8, 5), (9, 4)]
    assert [row[::2] for row in rows(read_table(rec, reindex=True))] == [(0, 4), (1, 5), (2, 6)]


def test_insightface_layout(rec: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_insightface(rec, [2, 2, 5, 7, 7, 7])
    file, (keys, offsets) = RecordFile(rec), read_idx(rec.with_suffix(".idx"))
    assert keys.tolist() == list(range(10))
    records = [file.image_record(offset) for offset in offsets]
    assert [record.id for record in records] == keys.tolist()
    assert [record.flag for record in records] == [2, 0, 0, 0, 0, 0, 0, 2, 2, 2]
    assert records[0].labels.tolist() == [7, 10]
    assert [record.labels.tolist() for record in records[7:]] == [[1, 3], [3, 4], [4, 7]]
    table = read_table(rec)
    assert table.keys.tolist() == [1, 2, 3, 4, 5, 6]
    assert table.labels.tolist() == [2, 2, 5, 7, 7, 7]
    assert not caplog.messages


def test_insightface_records_in_the_order_of_its_own_packer(rec: Path) -> None:
    """Images with two labels first, then record 0, then the identities."""
    images = [pack_image([label, 1], key, b"x") for key, label in enumerate([0, 0, 1], 1)]
    others = [pack_image(pair, key, b"") for key, pair in ((0, [4, 6]), (4, [1, 3]), (5, [3, 4]))]
    write(rec, images + others, keys=[1, 2, 3, 0, 4, 5])
    assert [row[::2] for row in rows(read_table(rec))] == [(1, 0), (2, 0), (3, 1)]
    assert rows(read_table(rec, reindex=True)) == rows(read_table(rec))


@pytest.mark.parametrize("count", [(1 << 24) + d for d in range(-3, 4)] + [42_474_557])
def test_counts_are_compared_as_float32(count: int) -> None:
    label = np.float32(count + 1)
    assert _is_count(label, count)
    assert not _is_count(label, count - 8) and not _is_count(label, count + 8)
    if count < (1 << 24) - 1:
        assert not _is_count(label, count - 1) and not _is_count(label, count + 1)


def test_wrong_count_in_the_header_is_only_a_warning(
    rec: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Images are counted; a header above 2^24 cannot be trusted, nor a file that lost some."""
    payloads = [pack_image([1e9, 2e9], 0, b""), pack_image(3, 1, b"x"), pack_image([1, 2], 2, b"")]
    assert rows(read_table(write(rec, payloads))) == [(1, 40, 3)]
    (message,) = caplog.messages
    assert "promises 1000000000 images in its header, got 1" in message


@pytest.mark.parametrize("label", [-1, 0.5, 1 << 24, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("own", [False, True])
def test_labels_that_are_no_identities_are_left_out(rec: Path, label: float, own: bool) -> None:
    bad = struct.pack("<IfQQ", own, 0 if own else label, 8, 0)
    bad += struct.pack("<f", label) * own + b"image"
    write(rec, [pack_image(1, 7, b"x"), bad], keys=[7, 8])
    table = read_table(rec)
    assert rows(table) == [(7, 0, 1)]
    (sentence,) = table.damaged
    assert re.search(r"whole numbers in \[0, 2\^24\), got .* key 8 at offset", sentence)


@pytest.mark.parametrize(
    ("index", "rule"),
    [
        (
            "0\t0\n1\t400\n",
            "rec ends at byte 72, before the record at offset 400 .*idx lists with key 1",
        ),
        ("0\t0\n1\t2\n", "offsets in .*idx must be multiples of 4, got 2 for key 1"),
        ("0\t0\n1\t4\n", "must begin with the magic number .* at offset 4"),
        ("3\t0\n3\t36\n", "keys in .*idx must be distinct, got 3 twice"),
        ("", "must hold images, got 0 records"),
    ],
)
def test_bad_index_is_named_and_can_be_replaced(rec: Path, index: str, rule: str) -> None:
    write(rec, [pack_image(label, label, b"x") for label in (0, 1)])
    expected = rows(read_table(rec))
    rec.with_suffix(".idx").write_text(index)
    if "1\t" in index:  # the other record is whole
        table = read_table(rec)
        (sentence,) = table.damaged
        assert rows(table) == expected[:1] and re.search(rule, sentence)
    else:
        with pytest.raises(ValueError, match=rule):
            read_table(rec)
    assert rows(read_table(rec, reindex=True)) == expected


def test_file_without_images_is_refused(rec: Path) -> None:
    write(rec, [pack_image([1, 1], 0, b"")])
    with pytest.raises(ValueError, match="must hold images, got 1 records and none with one"):
        read_table(rec)


def test_payload_that_is_no_image_record_is_named(rec: Path) -> None:
    write(rec, [pack_image(0, 0, b"x"), b"short"])
    (sentence,) = read_table(rec).damaged
    assert re.search(r"train\.rec at offset 36: .* 24 bytes, got 5", sentence)


# Damage


@pytest.mark.parametrize("indexed", [False, True])
def test_file_cut_at_every_byte(rec: Path, indexed: bool) -> None:
    """Whole records are found, the cut one is named, and those that only the index lists too."""
    payloads = [pack_image(1, 0, b"abc"), pack_image([2], 1, WORD + WORD), pack_image(3, 2, b"")]
    data = write(rec, payloads).read_bytes()
    offsets = read_table(rec).offsets.tolist()
    ends = [*offsets[1:], len(data)]
    if not indexed:
        rec.with_suffix(".idx").unlink()
    for size in range(1, len(data)):
        rec.write_bytes(data[:size])
        whole = sum(end <= size for end in ends)
        assert _sound_records(RecordFile(rec)).tolist() == offsets[:whole]
        if not whole:
            with pytest.raises(ValueError, match=r"must hold images, got 0 records and none .*: "):
                read_table(rec)
            continue
        table = read_table(rec)
        assert table.offsets.tolist() == offsets[:whole]
        lost = offsets[whole:] if indexed else offsets[whole:][: size not in ends]
        assert len(table.damaged) == len(lost)
        for offset, sentence in zip(lost, table.damaged, strict=True):
            assert f"offset {offset} " in sentence and str(rec) in sentence
            rule = "must end within the file" if offset + 8 <= size else f"ends at byte {size}, be"
            assert rule in sentence or not indexed


@pytest.mark.parametrize("reindex", [False, True])
@pytest.mark.parametrize("place", [0, 5, 6, 7])
def test_only_the_damaged_record_is_lost(rec: Path, reindex: bool, place: int) -> None:
    """A bit of magic number, length or flag: those before and after it are read."""
    data = bytearray(write(rec, [pack_image(1, key, b"abcd") for key in range(5)]).read_bytes())
    data[36 + place] ^= 1 << 6
    rec.write_bytes(data)
    table = read_table(rec, reindex)
    assert table.keys.tolist() == [0, 2, 3, 4]
    assert len(table.damaged) == 1 and "36" in table.damaged[0]


@pytest.mark.parametrize("reindex", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_any_flipped_bit_costs_its_own_record_at_most(
    rec: Path, reindex: bool, split: bool
) -> None:
    """And what it costs is said, unless the bit is of the image or of an id."""
    image = b"abcd" + WORD * split + b"efghi"
    write(rec, [pack_image(key % 3, key, image) for key in range(5)])
    data = rec.read_bytes()
    before = rows(read_table(rec))
    start, end = before[2][1], before[3][1]
    others = [row[1:] for row in before if row[1] != start]
    for bit in range(8 * start, 8 * end):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        rec.write_bytes(damaged)
        table = read_table(rec, reindex)
        found = [row[1:] for row in sorted(rows(table), key=lambda row: row[1])]
        assert [row for row in found if row[0] not in range(start, end)] == others
        assert start in table.offsets or 1 <= len(table.damaged) <= 2
        if table.damaged:
            assert str(rec) in table.damaged[0]
        elif bit // 8 not in range(start + 12, start + 16):  # a label may become another
            assert (start, before[2][2]) in found or damaged[start + 8]


@pytest.mark.parametrize(("place", "bit"), [(0, 0), (4, 0), (7, 0), (7, 5), (7, 6), (7, 7)])
def test_damaged_part_costs_its_own_record_at_most(rec: Path, place: int, bit: int) -> None:
    """Of a split record's second part: magic number, length, or flag, which may become a first."""
    write(rec, [pack_image(key, key, b"abcd" + WORD + b"efgh") for key in range(4)])
    start = int(read_table(rec).offsets[1])
    data = bytearray(rec.read_bytes())
    part = data.find(WORD, start + 4)
    data[part + place] ^= 1 << bit
    rec.write_bytes(data)
    table = read_table(rec, reindex=True)
    assert [key for key in table.keys.tolist() if key != 1] == [0, 2, 3]
    where = rf"\boffset ({start}|{part})\b"
    assert any(re.search(where, sentence) for sentence in table.damaged) or place == 4


def test_length_that_ends_within_its_padding(rec: Path) -> None:
    """The next head is one word behind what stands there."""
    data = bytearray(write(rec, [pack_image(k, k, b"abcde") for k in range(4)]).read_bytes())
    assert data[40 + 4] == 29
    data[40 + 4] = 28
    rec.write_bytes(data)
    table = read_table(rec, reindex=True)
    assert table.labels.tolist() == [0, 1, 2, 3] and "at offset 76" in table.damaged[0]


def test_heads_are_found_across_blocks(rec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(rec, [pack_image(key, key, bytes(400)) for key in range(3)]).read_bytes()
    head = data.find(WORD, 4)
    file = RecordFile(rec)
    for block in range(2, 40):
        monkeypatch.setattr(recordio, "_BLOCK", block)
        assert file._next_record(4) == head
        assert file._next_record(2 * head + 4) is None


def test_a_file_of_damage_is_refused(rec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordio, "_MOST_DAMAGED", 3)
    write(rec, [b"short"] * 5 + [pack_image(0, 5, b"x")])
    with pytest.raises(ValueError, match=r"more than 3 records are damaged, the last: .* got 5"):
        read_table(rec)


def read_everything(path: Path) -> int:
    """How many damaged records were named."""
    file, damaged = RecordFile(path), 0
    for reindex in (False, True):
        table = read_table(path, reindex)
        damaged += len(table.damaged)
        for offset in table.offsets:
            file.image_record(offset)
    for offset in _sound_records(file):
        file.record(offset)
    return damaged


def mutate(data: bytearray, rng: random.Random) -> None:
    kind = rng.randrange(5)
    at = rng.randrange(len(data))
    if kind == 0:  # a bit anywhere
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:  # a bit of a head, of a record or an image
        at = data.find(WORD, at) if data.find(WORD, at) >= 0 else 0
        data[min(at + rng.randrange(36), len(data) - 1)] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        del data[at : at + rng.randrange(1, 64)]
    else:
        data[at : at + 8] = rng.choice([rng.randbytes(8), bytes(8), WORD + b"\xff" * 4, WORD * 2])


def check_mutations(rec: Path, data: bytes, index: bytes, seeds: range) -> Counter[str]:
    """What became of the files: refused, read with or without damage, but no other error."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        rng = random.Random(seed)
        damaged, damaged_index = bytearray(data), bytearray(index)
        mutate(damaged_index if seed % 8 == 0 else damaged, rng)
        rec.write_bytes(damaged)
        rec.with_suffix(".idx").write_bytes(damaged_index)
        try:
            counts["damaged" if read_everything(rec) else "whole"] += 1
        except ValueError:
            counts["refused"] += 1
    return counts


few_and_many = pytest.mark.parametrize(
    "seeds", [range(200), pytest.param(range(200, 2200), marks=pytest.mark.slow)]
)


@few_and_many
def test_mutations_of_a_file_are_refused_or_named(rec: Path, seeds: range) -> None:
    data = mixed(rec, count=12).read_bytes()
    counts = check_mutations(rec, data, rec.with_suffix(".idx").read_bytes(), seeds)
    assert counts["damaged"] > len(seeds) / 3 and min(counts.values()) > len(seeds) / 50


@few_and_many
def test_mutations_of_mxnets_file_are_refused_or_named(pack: Path, rec: Path, seeds: range) -> None:
    data, index = (pack / "train.rec").read_bytes(), (pack / "train.idx").read_bytes()
    counts = check_mutations(rec, data, index, seeds)
    assert counts["damaged"] > len(seeds) / 3 and min(counts.values()) > len(seeds) / 50


# Writing


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir())


def write_and_fail(writer: RecordWriter, images: list[bytes]) -> None:
    with writer:
        for i, image in enumerate(images):
            writer.write_image(i, image)
        raise KeyError


def test_names_appear_only_on_closing(rec: Path) -> None:
    with RecordWriter(rec) as writer:
        writer.write_image(1, b"x")
        assert names(rec) == ["train.idx.part", "train.rec.part"]
    assert names(rec) == ["train.idx", "train.rec"]
    writer.close()  # once more does nothing
    with pytest.raises(ValueError, match=r"open writer, but .*train\.rec was finished"):
        writer.write(b"")


def test_exception_leaves_parts_that_resume(rec: Path) -> None:
    images = [bytes([i]) * i for i in range(10)]
    reference = rec.with_name("all.rec")
    with RecordWriter(reference) as writer:
        for i, image in enumerate(images):
            writer.write_image(i, image)
    with pytest.raises(KeyError):
        write_and_fail(writer := RecordWriter(rec), images[:6])
    assert names(rec) == ["all.idx", "all.rec", "train.idx.part", "train.rec.part"]
    with pytest.raises(ValueError, match="left as"):
        writer.close()
    with pytest.raises(ValueError, match=r"train\.rec\.part is left of an earlier run"):
        RecordWriter(rec)
    with RecordWriter(rec, resume=True) as writer:
        assert len(writer) == 6
        for i in range(6, 10):
            assert writer.write_image(i, images[i]) == i
    for suffix in (".rec", ".idx"):
        assert rec.with_suffix(suffix).read_bytes() == reference.with_suffix(suffix).read_bytes()


@pytest.mark.parametrize("make", [RecordWriter, InsightFaceWriter])
def test_killed_at_any_moment_it_resumes_to_the_same_bytes(rec: Path, make: type) -> None:
    """The parts as they are on disk after a kill: the one and the other cut anywhere."""
    rng = random.Random(0)
    images = [rng.randbytes(rng.randrange(9)) + WORD * rng.randrange(3) for _ in range(12)]

    def complete(path: Path, resume: bool) -> int:
        with make(path, resume=resume) as writer:
            kept = len(writer)
            for i in range(kept, len(images)):
                writer.write_image(i // 3, images[i])
        return kept

    assert complete(rec, resume=True) == 0  # nothing there: a start
    data, index = rec.read_bytes(), rec.with_suffix(".idx").read_bytes()
    offsets = [*_sound_records(RecordFile(rec)).tolist(), len(data)]
    header = make is InsightFaceWriter
    parts = [rec.with_name("train.rec.part"), rec.with_name("train.idx.part")]
    for _ in range(100):
        for file in (rec, rec.with_suffix(".idx")):
            file.unlink()
        sizes = rng.randint(0, len(data)), rng.randint(0, len(index))
        parts[0].write_bytes(data[: sizes[0]])
        parts[1].write_bytes(index[: sizes[1]])
        whole = sum(end <= sizes[0] for end in offsets[1:])
        lines = index[: sizes[1]].count(b"\n")
        kept = complete(rec, resume=True)
        assert kept == min(max(min(whole, lines) - header, 0), len(images))
        assert (rec.read_bytes(), rec.with_suffix(".idx").read_bytes()) == (data, index)


def test_resuming_says_which_image_was_the_last(rec: Path) -> None:
    """By the number that was kept with it, whatever keys and identity records say."""
    with InsightFaceWriter(rec) as writer:
        assert writer.last_id2 is None
        for place in (4, 5, 9, 1 << 40):
            writer.write_image(place % 1000 // 5, b"x" * (place % 7) + WORD, id2=place)
    data, index = rec.read_bytes(), rec.with_suffix(".idx").read_bytes()
    _, offsets = read_idx(rec.with_suffix(".idx"))
    assert [RecordFile(rec).image_record(o).id2 for o in offsets[1:5]] == [4, 5, 9, 1 << 40]
    for whole, last in enumerate([None, 4, 5, 9, 1 << 40, 1 << 40], 1):
        rec.unlink()
        rec.with_suffix(".idx").unlink()
        end = int(offsets[whole]) + 5  # within the head of the next record
        rec.with_name("train.rec.part").write_bytes(data[:end])
        rec.with_name("train.idx.part").write_bytes(index)
        with InsightFaceWriter(rec, resume=True) as writer:
            assert writer.last_id2 == last and len(writer) == min(whole - 1, 4)
            for place in [4, 5, 9, 1 << 40][len(writer) :]:
                writer.write_image(place % 1000 // 5, b"x" * (place % 7) + WORD, id2=place)
        assert rec.read_bytes() == data


def test_close_that_was_interrupted_between_the_names_resumes(rec: Path) -> None:
    write_insightface(rec, [0, 1, 1])
    data, index = rec.read_bytes(), rec.with_suffix(".idx").read_bytes()
    rec.rename(rec.with_name("train.rec.part"))
    with pytest.raises(ValueError, match=r"must be new, but .*train\.idx exists"):
        InsightFaceWriter(rec)
    with InsightFaceWriter(rec, resume=True) as writer:
        assert len(writer) == 3
    assert (rec.read_bytes(), rec.with_suffix(".idx").read_bytes()) == (data, index)
    assert names(rec) == ["train.idx", "train.rec"]


def test_lines_never_come_before_their_records(rec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the writer returns, every line on disk tells of a whole record on disk."""
    monkeypatch.setattr("fastface_lightning.data.formats.recordio._TEXT_BLOCK", 200)
    rec_part, idx_part = rec.with_name("train.rec.part"), rec.with_name("train.idx.part")
    writer, most = RecordWriter(rec), 0
    for i in range(50):
        writer.write_image(i, bytes(i))
        if rec_part.stat().st_size:
            whole = _sound_records(RecordFile(rec_part))
            _, offsets = read_idx(idx_part)
            assert _agreeing(offsets, whole) == len(offsets)
            most = len(offsets)
    assert most > 40
    writer.abort()


def test_resuming_drops_records_whose_heads_are_gone(rec: Path) -> None:
    """As after a power cut: the sizes are there, the bytes are zeros."""
    with pytest.raises(KeyError):
        write_and_fail(RecordWriter(rec), [b"abcd"] * 5)
    part = rec.with_name("train.rec.part")
    data = part.read_bytes()
    part.write_bytes(data[:72] + bytes(len(data) - 72))
    with RecordWriter(rec, resume=True) as writer:
        assert len(writer) == 2
        writer.write_image(2, b"abcd")
    assert rec.read_bytes() == data[:108]


def test_resuming_the_other_layout_is_refused(rec: Path) -> None:
    with pytest.raises(KeyError):
        write_and_fail(RecordWriter(rec), [b"x"])
    with pytest.raises(ValueError, match=r"train\.rec\.part must begin with a header record"):
        InsightFaceWriter(rec, resume=True)


@pytest.mark.parametrize("suffix", [".rec", ".idx"])
def test_nothing_is_overwritten(rec: Path, suffix: str) -> None:
    rec.with_suffix(suffix).write_text("precious")
    for resume in (False, True):
        with pytest.raises(ValueError, match=f"must be new, but .*train\\{suffix} exists"):
            RecordWriter(rec, resume=resume)
    assert rec.with_suffix(suffix).read_text() == "precious"


def test_full_disk_is_named_and_leaves_what_resumes(
    rec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system refuses bytes beyond a limit, within a record."""
    monkeypatch.setattr("fastface_lightning.data.formats.recordio._TEXT_BLOCK", 4096)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_001, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*train\.rec\.part: File too") as error:
            write_and_fail(RecordWriter(rec), [bytes(1000)] * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG
    assert names(rec) == ["train.idx.part", "train.rec.part"]
    with RecordWriter(rec, resume=True) as writer:
        assert 12 < len(writer) < 20
        for i in range(len(writer), 30):
            writer.write_image(i, bytes(1000))
    assert read_table(rec).labels.tolist() == list(range(30))


def test_swallowed_error_gives_no_name(rec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RecordWriter(rec)
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(writer, "_flush", full)
    with pytest.raises(OSError, match=r"cannot write .*rec\.part: No space left") as error:
        writer.write_image(0, bytes(1 << 23))
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(ValueError, match=r"left as .*train\.rec\.part"):
        writer.close()
    assert names(rec) == ["train.idx.part", "train.rec.part"]


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot write .*absent/a\.rec\.part: No such file"):
        RecordWriter(tmp_path / "absent" / "a.rec")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*a\.rec\.part: Not a directory"):
        RecordWriter(tmp_path / "file" / "a.rec")


def test_read_only_folder_is_named(rec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by whom the system lets write anywhere."""
    refused = Mock(side_effect=PermissionError(errno.EACCES, "Permission denied", str(rec)))
    monkeypatch.setattr(Path, "touch", refused)
    with pytest.raises(PermissionError, match=r"cannot write .*train\.rec: Permission denied"):
        InsightFaceWriter(rec, resume=True)
    assert names(rec) == []


def test_bad_arguments_are_refused(tmp_path: Path, rec: Path) -> None:
    with pytest.raises(ValueError, match=r"name must end in \.rec, got .*train\.idx"):
        RecordWriter(tmp_path / "train.idx")
    with InsightFaceWriter(rec) as writer:
        writer.write_image(5, b"x")
        with pytest.raises(ValueError, match="ascending label, got 4 after 5"):
            writer.write_image(4, b"x")
        for label in (1 << 24, 5.5):
            with pytest.raises(ValueError, match=r"label must be a whole number in \[0, 2\^24\)"):
                writer.write_image(cast(int, label), b"x")
    with RecordWriter(tmp_path / "b.rec") as plain:
        with pytest.raises(ValueError, match="label must be a whole number"):
            plain.write_image(-1, b"x")
        for key in (-1, 10**18):
            with pytest.raises(ValueError, match="key must lie in"):
                plain.write(b"", key)
        assert plain.write(b"", 41) == 41 and plain.write(b"") == 42


def test_payloads_of_half_a_gigabyte_are_refused(
    rec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastface_lightning.data.formats.recordio._TOO_LONG", 1000)
    with RecordWriter(rec) as writer:
        with pytest.raises(ValueError, match=r"shorter than 2\^29 bytes, got 1000"):
            writer.write(bytes(1000))
        writer.write(bytes(999))
    assert RecordFile(rec).record(0) == bytes(999)


@pytest.mark.slow
def test_three_hundred_thousand_records(rec: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Above any block's size, and with the head's count exact."""
    count = 300_000
    with InsightFaceWriter(rec) as writer:
        for i in range(count):
            writer.write_image(i // 30, b"\xff\xd8tiny")
    with caplog.at_level(logging.WARNING):
        table = read_table(rec)
    assert (table.keys == np.arange(1, count + 1)).all()
    assert (table.labels == np.arange(count) // 30).all()
    again = read_table(rec, reindex=True)
    assert all((a == b).all() for a, b in zip(table[:3], again[:3], strict=True))
    assert not caplog.messages


def test_index_gets_its_name_before_its_records(rec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So where there is a ``.rec``, everything is there."""
    order: list[str] = []
    replace = os.replace

    def watched(source: Path, target: Path) -> None:
        order.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    write(rec, [b"abcd"])
    assert order == ["train.idx", "train.rec"]


def test_ids_beyond_int64_are_no_keys(rec: Path) -> None:
    write(rec, [pack_image(4, 1 << 63, b"x"), pack_image(5, 0, b"x")])
    table = read_table(rec, reindex=True)
    assert (table.keys.tolist(), table.labels.tolist()) == ([0, 1], [4, 5])


def test_split_record_in_a_file_above_half_a_gigabyte(rec: Path) -> None:
    """There a flag read as part of the length would still lie within the file."""
    payload = struct.pack("<IfQQf", 1, 0, MAGIC, 0, 5) + b"image"  # split at its id
    size = write(rec, [payload]).stat().st_size
    with open(rec, "r+b") as file:  # a hole, of which the index does not tell
        file.truncate(size + (1 << 30))
    assert read_table(rec).labels.tolist() == [5]


def test_a_length_that_reaches_over_others_loses_none(
    rec: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without an index; the image of that record is there, with others behind it."""
    data = bytearray(write(rec, [pack_image(1, key, b"abcd") for key in range(200)]).read_bytes())
    data[36 * 50 + 4 + 1] ^= 1 << 3
    rec.write_bytes(data)
    table = read_table(rec, reindex=True)
    assert table.keys.tolist() == list(range(200)) and not table.damaged
    assert f"offset {36 * 50} of {rec} must end before the next, at {36 * 51}" in caplog.text


def test_an_image_is_where_a_record_is(rec: Path) -> None:
    inside = struct.pack("<III", MAGIC, 24, 0) + bytes(40)
    file = RecordFile(write(rec, [pack_image(0, 0, b"x" + inside)]))
    assert file.image(0) == b"x" + inside
    with pytest.raises(ValueError, match="must be multiples of 4"):
        file.image(8 + 24 + 1)
    rec.write_bytes(rec.read_bytes()[:-1])
    with pytest.raises(ValueError, match="must end within the file"):
        RecordFile(rec).image(0)
