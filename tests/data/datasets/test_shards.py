"""Tar shards are read in place like folders, whoever wrote them, and damage to them is named."""

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from fastface_lightning.data import IdentityFolder, ShardDataset, open_faces
from fastface_lightning.data.datasets import shards
from fastface_lightning.data.formats.tar import read_shard, write_shards
from fastface_lightning.inference.protocols import Identities, open_protocol


def png(red: int, green: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (red, green, 7)).save(file, "PNG")
    return file.getvalue()


def sample(key: str, identity: str, red: int, green: int = 0) -> dict[str, bytes]:
    return {f"{key}.png": png(red, green), f"{key}.cls": identity.encode()}


FACES = sample("0", "bob", 1) | sample("1", "ann", 0) | sample("2", "bob", 1, 1)


def pack(file: Path, members: dict[str, bytes] = FACES, **options: int) -> Path:
    file.parent.mkdir(exist_ok=True)
    with tarfile.open(file, "w", **options) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


def read(dataset: ShardDataset) -> list[tuple[int, int, int]]:
    """(red, green, label) of each image."""
    return [
        (int(x[0, 0, 0]), int(x[1, 0, 0]), y) for x, y in (dataset[i] for i in range(len(dataset)))
    ]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_served_as_files_are(tmp_path: Path, form: int) -> None:
    prefix = "" if form == tarfile.USTAR_FORMAT else "ümit/" + 120 * "long"
    file = pack(tmp_path / "a.tar", {prefix + name: c for name, c in FACES.items()}, format=form)
    dataset = ShardDataset(file, size=8)
    assert list(dataset.identities) == ["ann", "bob"] and dataset.num_classes == 2
    assert read(dataset) == [(1, 0, 1), (0, 0, 0), (1, 1, 1)]
    assert [bytes(dataset.encoded(i)) for i in range(3)] == [png(1, 0), png(0, 0), png(1, 1)]
    assert dataset.name(2) == f"{file}/{prefix}2.png"
    assert isinstance(dataset.encoded(0), memoryview), "it is copied"


def test_several_shards_are_one_population(tmp_path: Path) -> None:
    pack(tmp_path / "faces" / "1.tar", sample("0", "cem", 2) | sample("1", "ann", 0))
    pack(tmp_path / "faces" / "0.TAR", sample("0", " 10\n", 3) | sample("1", "9", 4))
    pack(tmp_path / "faces" / ".1.tar.part.tar", sample("0", "nobody", 9))
    (tmp_path / "faces" / "notes.txt").write_text("")
    dataset = ShardDataset(tmp_path / "faces", size=8)
    assert list(dataset.identities) == ["10", "9", "ann", "cem"], "text is sorted as text"
    assert read(dataset) == [(3, 0, 0), (4, 0, 1), (2, 0, 3), (0, 0, 2)]
    part = dataset.restricted(["cem", "9"])
    assert read(part) == [(4, 0, 0), (2, 0, 1)] and part.identities == ["9", "cem"]


def test_more_shards_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN", 2)
    for number in range(5):
        pack(tmp_path / f"{number}.tar", sample("a", str(number), number))
    dataset = ShardDataset(tmp_path, size=8)
    assert [red for red, _, _ in read(dataset) + read(dataset)] == [*range(5)] * 2
    assert len(dataset._maps) == 2


def test_what_makes_no_sample_is_passed_over_or_left_out_and_named(tmp_path: Path, caplog) -> None:
    members = {
        **FACES,
        "WebFace/3.JPEG": png(5, 5),
        "WebFace/3.cls": b"cem",
        "WebFace/3.mask.png": b"other pixels",
        "._0.png": b"of a Mac",
        "lonely.png": png(9, 9),
        "blank.png": png(9, 9),
        "blank.cls": b" \n",
        "novel.jpg": png(9, 9),
        "novel.cls": b"a" * 2000,
        "absent.cls": b"ann",
    }
    file = pack(tmp_path / "a.tar", members)
    with tarfile.open(file, "a") as archive:
        for name, kind in (
            ("folder.png", tarfile.DIRTYPE),
            ("linked.png", tarfile.LNKTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "0.png"
            archive.addfile(member)
    dataset = ShardDataset(file, size=8)
    assert list(dataset.identities) == ["ann", "bob", "cem"] and len(dataset) == 4
    keys = [sentence.split()[0] for sentence in dataset.damaged]
    assert keys == ["absent", "blank", "linked", "lonely", "novel"]
    assert "left out: " in caplog.text and f"absent in {file} has no image" in caplog.text
    with pytest.raises(ValueError, match="max_bad = 4"):
        ShardDataset(file, max_bad=4)


def test_a_key_that_stands_twice_in_a_shard_is_refused(tmp_path: Path) -> None:
    with tarfile.open(pack(tmp_path / "a.tar"), "a") as archive:
        archive.addfile(tarfile.TarInfo("0.jpg"))
    with pytest.raises(ValueError, match=r"a\.tar: it holds 0\.jpg .*twice"):
        ShardDataset(tmp_path)


def test_a_gzipped_shard_is_refused_with_the_command_that_unpacks_it(tmp_path: Path) -> None:
    file = tmp_path / "my faces" / "a.tgz"
    content = pack(file).read_bytes()
    file.write_bytes(gzip.compress(content))
    for root in (file, file.parent):
        with pytest.raises(ValueError, match=f"gunzip '{file}'"):
            open_faces(root)


def test_absent_empty_foreign_and_cut_files_are_refused_by_name(tmp_path: Path) -> None:
    for root in (tmp_path / "no.tar", tmp_path):
        with pytest.raises(ValueError, match=r"no \.tar file"):
            ShardDataset(root)
    file = tmp_path / "a.tar"
    whole = pack(file).read_bytes()
    end = 6 * 1024 + 512  # six members of a header and a block each, and what ends the file
    assert read_shard(file)[0] and not any(whole[end - 512 :])
    for content in (b"text" * 500, *(whole[:length] for length in range(0, end, 100))):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"cannot read shard {file}"):
            ShardDataset(tmp_path)
    with pytest.raises(ValueError, match=r"no <key>\.jpg"):
        ShardDataset(pack(file, {"0.png": png(0, 0)}))
    assert not list(tmp_path.glob("*.index"))


def header_of(name: str, size: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A member's header with this size field, and a true checksum."""
    header = tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT)
    header = header[:124] + size.ljust(12, b"\0") + b" " * 20 + kind + header[157:]
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


SIZES = {
    "beyond the file": b"00000200000",
    "beyond memory": b"\x80" + 3 * b"\0" + 8 * b"\xff",
    "back to the header": b"\xff" * 10 + b"\xfc\x00",
    "no number": b"kilo",
}


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, b"L", b"x"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_hostile_size_is_refused(tmp_path: Path, size: bytes, kind: bytes) -> None:
    content = pack(tmp_path / "a.tar").read_bytes()[: 6 * 1024]
    (tmp_path / "a.tar").write_bytes(content + header_of("3.png", size, kind) + bytes(10240))
    with pytest.raises(ValueError, match=r"cannot read shard .*a\.tar"):
        ShardDataset(tmp_path)


def test_damaged_bytes_are_refused_or_make_bad_images(tmp_path: Path) -> None:
    """Any byte of a header changed, or four of the file: one sentence, or samples."""
    rng = np.random.default_rng(0)
    whole = np.frombuffer(pack(tmp_path / "a.tar").read_bytes()[: 7 * 1024], np.uint8)
    places = [[at] for at in range(0, 512, 3)] + rng.integers(0, len(whole), (100, 4)).tolist()
    refused = []
    for k, place in enumerate(places):
        damaged = whole.copy()
        damaged[place] ^= 0x81
        damaged.tofile(tmp_path / f"{k}.tar")
        try:
            read_shard(tmp_path / f"{k}.tar")
        except ValueError as error:
            refused.append(f"cannot read shard {tmp_path / f'{k}.tar'}" in str(error))
    assert all(refused) and len(refused) > 170, "the headers' checksums do not count"


def test_the_second_start_reads_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(tmp_path / "faces" / "0.tar")
    want = read(ShardDataset(tmp_path / "faces", size=8))
    assert (tmp_path / "faces.index").is_file()

    def indexed_again(file: Path) -> None:
        raise AssertionError(file)

    monkeypatch.setattr(shards, "read_shard", indexed_again)
    assert read(ShardDataset(tmp_path / "faces", size=8)) == want
    with pytest.raises(AssertionError):
        ShardDataset(tmp_path / "faces", reindex=True)
    pack(tmp_path / "faces" / "1.tar")
    with pytest.raises(AssertionError):
        ShardDataset(tmp_path / "faces")


def test_a_shard_replaced_under_its_index(tmp_path: Path, caplog) -> None:
    """What is mapped stays what it was; what is opened later is not served as what it is not."""
    file = pack(tmp_path / "a.tar")
    before, later = ShardDataset(file, size=8), ShardDataset(file, size=8)
    want = read(before)
    (tmp_path / "b").write_bytes(bytes(1100))
    os.replace(tmp_path / "b", file)
    assert read(before) == want
    with pytest.raises(ValueError, match="none of the 3 images"):
        later[0]
    assert "its shard ends before it" in caplog.text


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_alike_and_count_together(tmp_path: Path, context: str) -> None:
    file = pack(tmp_path / "a.tar", {**FACES, "1.png": b"text"})
    dataset = ShardDataset(file, size=8)
    assert dataset[0]  # its map is open already
    loader = DataLoader(dataset, 1, num_workers=2, multiprocessing_context=context)
    assert [int(label) for _, label in loader] == [1, 1, 1]
    assert dataset.bad_images() == [f"{file}/1.png"]


def test_open_faces_knows_shards(tmp_path: Path) -> None:
    file = pack(tmp_path / "faces" / "a.tar")
    (tmp_path / "faces" / ".cache").mkdir()  # which download programs leave
    for root in (file, file.parent):
        assert isinstance(open_faces(root), ShardDataset)
        protocol = open_protocol(root)
        before = protocol.digest()
        assert isinstance(protocol, Identities) and protocol.count == 3
        os.utime(file, ns=(0, 0) if root == file else (9, 9))
        assert protocol.digest() != before
    (tmp_path / "faces" / "ann").mkdir()
    (tmp_path / "faces" / "ann" / "0.png").write_bytes(png(0, 0))
    assert isinstance(open_faces(file.parent), IdentityFolder)


Samples = list[tuple[bytes, str] | None]
WRITTEN: Samples = [(png(i, 3), f"person {i % 3}") for i in range(8)]
WRITTEN[4] = None


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    write_shards(tmp_path / "one", lambda start: WRITTEN[start:], 3)
    names = ["000000.tar", "000001.tar", "000002.tar"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == names
    dataset = ShardDataset(tmp_path / "one", size=8)
    assert list(dataset.identities) == ["person 0", "person 1", "person 2"]
    assert read(dataset) == [(i, 3, i % 3) for i in range(8) if i != 4]
    assert dataset.name(4).endswith("000001.tar/00000005.jpg")


def test_an_interrupted_run_keeps_its_shards_and_ends_like_a_whole_one(tmp_path: Path) -> None:
    started: list[int] = []

    def failing(start: int):
        started.append(start)
        yield from WRITTEN[start:5]
        raise RuntimeError("the power is gone")

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write_shards(whole, lambda start: WRITTEN[start:], 3)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            write_shards(broken, failing, 3)
        assert [path.name for path in broken.iterdir()] == ["000000.tar"]
    kept = (broken / "000000.tar").stat().st_mtime_ns
    write_shards(broken, lambda start: WRITTEN[start:], 3)
    assert started == [0, 3] and (broken / "000000.tar").stat().st_mtime_ns == kept
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == {
        p.name: p.read_bytes() for p in broken.iterdir()
    }


@pytest.mark.parametrize("identity", ["", "ann\n", "a" * 1025, "\udcfc"])
def test_an_identity_that_would_not_come_back_is_not_written(tmp_path: Path, identity: str) -> None:
    with pytest.raises(ValueError, match="identity must be"):
        write_shards(tmp_path, lambda start: [(png(0, 0), identity)])
    assert not list(tmp_path.iterdir())
