"""Record files are read as MXNet wrote them; damage is named, and costs no other record."""

import random
import re
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastface_lightning.data.formats import recordio
from fastface_lightning.data.formats.recordio import (
    MAGIC,
    RecordFile,
    RecordTable,
    parse_image_record,
    read_idx,
    read_table,
)
from fastface_lightning.data.formats.recordio_writer import (
    InsightFaceWriter,
    encode_record,
    pack_image,
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
    """A plain pack, without InsightFace's header."""
    records = [encode_record(payload) for payload in payloads]
    offsets = np.cumsum([0, *map(len, records)]).tolist()
    path.write_bytes(b"".join(records))
    lines = zip(keys or range(len(records)), offsets, strict=False)
    path.with_suffix(".idx").write_text("".join(f"{key}\t{offset}\n" for key, offset in lines))
    return path


def write_insightface(path: Path) -> Path:
    with InsightFaceWriter(path) as writer:
        for label in (0, 0, 3, 3, 4):
            writer.write_image(label, bytes([label]))
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
    assert rows(table) == slow_table(pack / "train.rec") and len(expected) == 8
    for offset, (key, label, name) in zip(table.offsets.tolist(), expected, strict=True):
        record = file.image_record(offset)
        assert (record.flag, record.id, record.labels) == (0, key, (label,))
        assert bytes(record.image) == (pack / name).read_bytes()
    keys, offsets = read_idx(pack / "train.idx")
    assert keys.dtype == offsets.dtype == np.int64 and keys.tolist() == [0, 4, 7, 5, 1, 6, 3, 2]
    assert offsets.tolist() == [0, 5500, 11228, 16648, 21660, 26504, 33296, 38568]


def test_rewriting_gives_the_same_bytes(pack: Path) -> None:
    file, records = RecordFile(pack / "train.rec"), []
    for offset in read_idx(pack / "train.idx")[1].tolist():
        image = file.image_record(offset)
        payload = pack_image(image.labels[0], image.id, image.image)
        assert payload == file.record(offset)
        records.append(encode_record(payload))
    assert b"".join(records) == (pack / "train.rec").read_bytes()


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
    assert list(file.scan()) == [0, 16, 48]
    assert bytes(file.record(16)) == b"abcd" + WORD + WORD + b"xyz"
    assert file.record(0) == b"whole" and file.record(48) == b""


seeded = st.lists(
    st.one_of(st.just(WORD), st.binary(max_size=6), st.just(WORD[:2]), st.just(bytes(4))),
    max_size=12,
).map(b"".join)


@settings(max_examples=50)
@given(payload=seeded)
def test_splitting_agrees_with_the_plain_twin(payload: bytes) -> None:
    assert encode_record(payload) == encode_record(memoryview(payload)) == slow_encode(payload)


@settings(max_examples=30)
@given(payloads=st.lists(seeded, min_size=1, max_size=6))
def test_what_is_written_is_read(
    payloads: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(tmp_path_factory.mktemp("split") / "a.rec", payloads)
    file, (keys, offsets) = RecordFile(path), read_idx(path.with_suffix(".idx"))
    assert keys.tolist() == list(range(len(payloads)))
    assert list(file.scan()) == offsets.tolist()
    assert [bytes(file.record(offset)) for offset in offsets] == payloads


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 12,
        raw(2, b"ab"),
        raw(7, b"ab"),
        raw(1, b"ab") + raw(0, b"c"),
        raw(1, b"ab"),
        raw(0, b"ab", 5),
        raw(0, b"ab", (1 << 29) - 1),
        raw(1, b"") + raw(3, b"", (1 << 29) - 4),
    ],
)
def test_faulty_records_are_named(rec: Path, data: bytes) -> None:
    rec.write_bytes(raw(0, b"abcd") + data)
    file = RecordFile(rec)
    assert file.record(0) == b"abcd"
    with pytest.raises(ValueError) as error:
        file.record(12)
    assert str(rec) in str(error.value) and " 12" in str(error.value)
    for offset in (-4, 2, 1 << 70):
        with pytest.raises(ValueError, match="offset"):
            file.record(offset)


# Image records


def test_image_record_with_and_without_labels_of_its_own(rec: Path) -> None:
    plain = parse_image_record(pack_image(7, 1 << 63, b"jpeg"))
    assert plain == (0, (7.0,), 1 << 63, 0, b"jpeg")
    listed = parse_image_record(pack_image([3, 1.5], 9, b"jpeg"))
    assert listed == (2, (3.0, 1.5), 9, 0, b"jpeg")
    assert pack_image(2, 3, b"x") == struct.pack("<IfQQ", 0, 2, 3, 0) + b"x"
    for payload, rule in (
        (bytes(23), "at least 24 bytes, got 23"),
        (struct.pack("<IfQQ", 1 << 30, 0, 0, 0) + b"x", f"with {1 << 30} labels"),
    ):
        with pytest.raises(ValueError, match=f"{rec} at offset 0: .*{rule}"):
            RecordFile(write(rec, [payload])).image_record(0)


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
    ["1", "1\t2\t3", "a\t1", "1\t-4", "1\t2.0", "1\t" + 19 * "9", "\0"],
)
def test_malformed_line_is_refused(tmp_path: Path, line: str) -> None:
    file = tmp_path / "a.idx"
    for text in (f"0\t0\n5\t8\n{line}\n6\t16\n", f"{line}\n", f"{line}\n{line}"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"each line of .*a\.idx must be"):
            read_idx(file)
    with pytest.raises(ValueError, match=r"cannot read .*b\.idx"):
        read_idx(tmp_path / "b.idx")


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


@pytest.mark.parametrize("make", [mixed, write_insightface])
def test_table_agrees_with_the_plain_twin(rec: Path, make: Callable[[Path], Path]) -> None:
    """By the index, and found without one."""
    make(rec)
    expected = slow_table(rec)
    for _ in range(2):
        table = read_table(rec)
        assert [column.dtype for column in table[:3]] == 3 * [np.int64]
        assert rows(table) == expected and not table.damaged
        rec.with_suffix(".idx").unlink(missing_ok=True)


def without_index(rec: Path) -> RecordTable:
    rec.with_suffix(".idx").unlink(missing_ok=True)
    return read_table(rec)


@pytest.mark.parametrize("ids", [[0, 0, 0], [1 << 63, 0, 1]])
def test_without_index_and_distinct_ids_places_are_keys(rec: Path, ids: list[int]) -> None:
    write(rec, [pack_image(k, id, b"x") for k, id in enumerate(ids, 4)], keys=[9, 8, 7])
    assert [row[::2] for row in rows(read_table(rec))] == [(7, 6), (8, 5), (9, 4)]
    assert [row[::2] for row in rows(without_index(rec))] == [(0, 4), (1, 5), (2, 6)]


def test_insightface_records_in_the_order_of_its_own_packer(rec: Path) -> None:
    """Images with two labels first, then record 0, then the identities."""
    images = [pack_image([label, 1], key, b"x") for key, label in enumerate([0, 0, 1], 1)]
    others = [pack_image(pair, key, b"") for key, pair in ((0, [4, 6]), (4, [1, 3]), (5, [3, 4]))]
    write(rec, images + others, keys=[1, 2, 3, 0, 4, 5])
    assert [row[::2] for row in rows(read_table(rec))] == [(1, 0), (2, 0), (3, 1)]
    assert [row[::2] for row in rows(without_index(rec))] == [(1, 0), (2, 0), (3, 1)]


@pytest.mark.parametrize("promised", [1, 1e9])
def test_wrong_count_in_the_header_is_only_a_warning(
    rec: Path, promised: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Images are counted; a header above 2^24 cannot be trusted, nor a file that lost some."""
    payloads = [pack_image([promised + 1, 9], 0, b""), pack_image(3, 1, b"x")]
    assert rows(read_table(write(rec, payloads))) == [(1, 40, 3)]
    assert ("promises 999999999 images" in caplog.text) == bool(caplog.text) == (promised > 1)


@pytest.mark.parametrize("label", [-1, 0.5, 1 << 24, float("nan"), float("inf")])
@pytest.mark.parametrize("own", [False, True])
def test_labels_that_are_no_identities_are_left_out(rec: Path, label: float, own: bool) -> None:
    bad = struct.pack("<IfQQ", own, 0 if own else label, 8, 0)
    bad += struct.pack("<f", label) * own + b"image"
    write(rec, [pack_image(1, 7, b"x"), bad], keys=[7, 8])
    table = read_table(rec)
    assert rows(table) == [(7, 0, 1)]
    (sentence,) = table.damaged
    assert re.search(r"whole numbers in \[0, 2\^24\), got .* at offset 36", sentence)


@pytest.mark.parametrize(
    ("index", "rule"),
    [
        ("0\t0\n1\t400\n", r"ends at byte 72, before the record at offset 400"),
        ("0\t0\n1\t2\n", "multiples of 4, got 2"),
        ("0\t0\n1\t4\n", "magic number .* at offset 4"),
        ("3\t0\n3\t36\n", "distinct, got 3 twice"),
        ("", "must hold images, got none in 0 records"),
    ],
)
def test_bad_index_is_named(rec: Path, index: str, rule: str) -> None:
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
    assert rows(without_index(rec)) == expected


def test_records_that_are_no_images(rec: Path) -> None:
    write(rec, [pack_image(0, 0, b"x"), b"short"])
    (sentence,) = read_table(rec).damaged
    assert re.search(r"train\.rec at offset 36: .* 24 bytes, got 5", sentence)
    write(rec, [pack_image([1, 1], 0, b"")])
    with pytest.raises(ValueError, match="got none in 1 records"):
        read_table(rec)


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
        if not whole:
            with pytest.raises(ValueError, match="must hold images, got none in"):
                read_table(rec)
            continue
        table = read_table(rec)
        assert table.offsets.tolist() == offsets[:whole]
        lost = offsets[whole:] if indexed else offsets[whole:][: size not in ends]
        assert len(table.damaged) >= len(lost) and bool(table.damaged) == bool(lost)
        for offset in lost:
            assert any(f"offset {offset}" in sentence for sentence in table.damaged)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_any_flipped_bit_costs_its_own_record_at_most(
    rec: Path, indexed: bool, split: bool
) -> None:
    """And what it costs is said, unless the bit is of the image or of an id."""
    image = b"abcd" + WORD * split + b"efghi"
    write(rec, [pack_image(key % 3, key, image) for key in range(4)])
    data = rec.read_bytes()
    before = rows(read_table(rec))
    if not indexed:
        rec.with_suffix(".idx").unlink()
    start, end = before[1][1], before[2][1]
    others = [row[1:] for row in before if row[1] != start]
    for bit in range(8 * start, 8 * end):
        if (bit // 8 - start) // 4 in (2, 3, 4, 5, 6) and bit % 5:  # some of label, id and flag
            continue
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        rec.write_bytes(damaged)
        table = read_table(rec)
        found = [row[1:] for row in sorted(rows(table), key=lambda row: row[1])]
        assert [row for row in found if row[0] not in range(start, end)] == others
        assert start in table.offsets or 1 <= len(table.damaged) <= 3
        if table.damaged:
            assert str(rec) in table.damaged[0]
        elif bit // 8 not in range(start + 12, start + 16):  # a label may become another
            assert (start, before[1][2]) in found or damaged[start + 8]


def test_lengths_that_are_wrong_lose_no_other(rec: Path) -> None:
    """Without an index: a record that reaches over others, and one that ends too soon."""
    data = bytearray(write(rec, [pack_image(1, key, b"abcd") for key in range(200)]).read_bytes())
    data[36 * 50 + 4 + 1] ^= 1 << 3
    data[36 * 90 + 4] -= 4
    rec.write_bytes(data)
    table = without_index(rec)
    assert table.keys.tolist() == list(range(200))
    (sentence,) = table.damaged
    assert f"offset {36 * 91 - 4}" in sentence


def test_a_file_of_damage_is_refused(rec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordio, "_MAX_DAMAGED", 3)
    write(rec, [b"short"] * 5 + [pack_image(0, 5, b"x")])
    with pytest.raises(ValueError, match="more than 3 records are damaged"):
        read_table(rec)


def mutate(data: bytearray, rng: random.Random) -> None:
    """A bit flipped anywhere or near a head, a cut, bytes gone, or others in their place."""
    at = rng.randrange(len(data))
    match rng.randrange(5):
        case 0:
            data[at] ^= 1 << rng.randrange(8)
        case 1:
            at = max(data.find(WORD, at), 0)
            data[min(at + rng.randrange(36), len(data) - 1)] ^= 1 << rng.randrange(8)
        case 2:
            del data[at:]
        case 3:
            del data[at : at + rng.randrange(1, 64)]
        case 4:
            data[at : at + 8] = rng.choice([rng.randbytes(8), WORD + b"\xff" * 4, WORD * 2])


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutations_of_a_file_are_refused_or_named(rec: Path, count: int) -> None:
    """And what is found can be read."""
    file = mixed(rec, count=12)
    data, index = file.read_bytes(), file.with_suffix(".idx").read_bytes()
    counts: Counter[str] = Counter()
    for seed in range(count):
        rng = random.Random(seed)
        damaged, damaged_index = bytearray(data), bytearray(index)
        mutate(damaged_index if seed % 8 == 0 else damaged, rng)
        rec.write_bytes(damaged)
        rec.with_suffix(".idx").write_bytes(damaged_index)
        try:
            for table in (read_table(rec), without_index(rec)):
                for offset in table.offsets.tolist():
                    RecordFile(rec).image_record(offset)
                counts["damaged" if table.damaged else "whole"] += 1
        except ValueError:
            counts["refused"] += 1
    assert counts["damaged"] > count / 3 and min(counts.values()) > count / 50
