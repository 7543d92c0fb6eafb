"""Archives are read in place like folders, and damage to them is named."""

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from fastface_lightning.data import IdentityFolder, ZippedFaces, encode_jpeg
from fastface_lightning.data.datasets import zips

STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


def png(red: int, green: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (red, green, 7)).save(file, "PNG")
    return file.getvalue()


def pack(file: Path, members: dict[str, bytes], method: int = STORED) -> Path:
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def people(*names: str, each: int = 2) -> dict[str, bytes]:
    """Image j of the k-th person is red k, green j."""
    return {f"{n}/{j}.png": png(k, j) for k, n in enumerate(names) for j in range(each)}


def read(dataset: ZippedFaces) -> list[tuple[int, int, int]]:
    return [
        (int(x[0, 0, 0]), int(x[1, 0, 0]), y) for x, y in (dataset[i] for i in range(len(dataset)))
    ]


@pytest.mark.parametrize("method", [STORED, DEFLATED])
def test_members_are_served_as_files_are(tmp_path: Path, method: int) -> None:
    members = people("ann", "bob", "cem")
    for name, content in members.items():
        (tmp_path / "faces" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "faces" / name).write_bytes(content)
    dataset = ZippedFaces(pack(tmp_path / "faces.zip", members, method), size=8)
    want = IdentityFolder(tmp_path / "faces", size=8)
    assert list(dataset.identities) == list(want.identities)
    assert len(dataset) == len(want) == 6
    for i in range(6):
        assert torch.equal(dataset[i][0], want[i][0]) and dataset[i][1] == want[i][1]
        assert bytes(dataset.encoded(i)) == want.encoded(i)
    assert dataset.name(3) == f"{tmp_path}/faces.zip/bob/1.png"


def test_stored_members_are_not_copied(tmp_path: Path) -> None:
    dataset = ZippedFaces(pack(tmp_path / "a.zip", people("ann")), size=8)
    assert isinstance(dataset.encoded(0), memoryview)


def test_several_archives_are_one_population(tmp_path: Path) -> None:
    pack(tmp_path / "1.zip", {"cem/0.png": png(2, 0), "ann/0.png": png(0, 0)})
    pack(tmp_path / "0.zip", {"bob/0.png": png(1, 0), "ann/1.png": png(0, 1)}, DEFLATED)
    (tmp_path / "notes.txt").write_text("")
    dataset = ZippedFaces(tmp_path, size=8)
    assert list(dataset.identities) == ["ann", "bob", "cem"]
    assert read(dataset) == [(1, 0, 1), (0, 1, 0), (2, 0, 2), (0, 0, 0)]
    assert (tmp_path.with_name(tmp_path.name + ".index")).is_file()


def test_the_folder_of_the_image_is_the_identity_and_the_rest_is_ignored(tmp_path: Path) -> None:
    members = {
        "WebFace/part 1/ann/": b"",
        "WebFace/part 1/ann/0.png": png(0, 0),
        "WebFace/part 2/ann/0.PNG": png(0, 1),
        "bob/0.png": png(1, 0),
        "bob/notes.txt": b"text",
        "bob/folder.png/": b"",
        "__MACOSX/bob/._0.png": b"junk",
        "loose.png": png(9, 9),
    }
    dataset = ZippedFaces(pack(tmp_path / "a.zip", members), size=8)
    assert list(dataset.identities) == ["ann", "bob"]
    assert read(dataset) == [(0, 0, 0), (0, 1, 0), (1, 0, 1)]
    names = {(y, dataset.file_name(i)) for i, (_, _, y) in enumerate(read(dataset))}
    assert len(names) == 3, "two members of a name overwrite one another as files"


def test_names_of_any_script(tmp_path: Path) -> None:
    dataset = ZippedFaces(pack(tmp_path / "a.zip", {"ümit 陈/0.png": png(0, 0)}), size=8)
    assert list(dataset.identities) == ["ümit 陈"] and read(dataset) == [(0, 0, 0)]


def test_the_second_start_opens_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = pack(tmp_path / "a.zip", people("ann", "bob"))
    want = read(ZippedFaces(file, size=8))

    def images(archive: Path) -> None:
        raise AssertionError(f"{archive} is indexed again")

    monkeypatch.setattr(zips, "_images", images)
    assert read(ZippedFaces(file, size=8)) == want
    with pytest.raises(AssertionError, match="is indexed again"):
        ZippedFaces(file, size=8, reindex=True)


def test_a_replaced_archive_is_indexed_anew(tmp_path: Path) -> None:
    file = pack(tmp_path / "a.zip", people("ann", "bob"))
    before = ZippedFaces(file, size=8)
    want = read(before)
    pack(tmp_path / "b", people("ann", "bob", "cem", each=3))
    os.replace(tmp_path / "b", file)
    assert len(ZippedFaces(file, size=8)) == 9
    assert read(before) == want, "what is mapped stays what it was"


def test_an_archive_added_to_the_folder_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "zips"
    folder.mkdir()
    pack(folder / "0.zip", people("ann"))
    assert len(ZippedFaces(folder)) == 2
    pack(folder / "1.zip", people("ann"))
    assert len(ZippedFaces(folder)) == 4


def test_an_archive_replaced_under_its_index_gives_bad_images(tmp_path: Path, caplog) -> None:
    """Opened after the replacement, it holds no such members; nothing is served in their place."""
    file = pack(tmp_path / "a.zip", people("ann", "bob"))
    dataset = ZippedFaces(file, size=8)
    pack(tmp_path / "b", {"x/long name of another.png": bytes(3000), **people("bob")})
    os.replace(tmp_path / "b", file)
    with pytest.raises(ValueError, match=r"none of the 4 images in .*a\.zip can be read"):
        dataset[0]
    assert len(caplog.records) == 4 and "holds no member where its table says" in caplog.text


@pytest.mark.parametrize("method", [STORED, DEFLATED])
def test_every_flipped_bit_of_the_payload_is_noticed(tmp_path: Path, method: int, caplog) -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8))
    noise.save(tmp_path / "noise.bmp")
    content = (tmp_path / "noise.bmp").read_bytes()
    file = pack(tmp_path / "a.zip", {"ann/0.bmp": content, "ann/1.png": png(5, 5)}, method)
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        length = archive.infolist()[0].compress_size
    ZippedFaces(file, size=8)
    status = file.stat()
    for at in range(39, 39 + length, 7):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        dataset = ZippedFaces(file, size=8)
        caplog.clear()
        assert dataset[0][0][0, 0, 0] == 5, at
        assert dataset.bad_images() == [f"{file}/ann/0.bmp"]
        assert f"{file}/ann/0.bmp: it" in caplog.text


def test_a_member_cannot_inflate_beyond_its_table(tmp_path: Path) -> None:
    """Ten megabytes of zeros whose table says ten bytes: ten bytes, and one more, are inflated."""
    file = pack(tmp_path / "a.zip", {"ann/0.png": bytes(10**7), "ann/1.png": png(5, 5)}, DEFLATED)
    data = file.read_bytes()
    table = data.index(b"PK\x01\x02")
    file.write_bytes(data[: table + 24] + struct.pack("<I", 10) + data[table + 28 :])
    dataset = ZippedFaces(file, size=8)
    with pytest.raises(ValueError, match=r"a\.zip/ann/0\.png: its checksum is wrong"):
        dataset.encoded(0)
    assert len(zips._inflate(data[39 : table - 1], 10)) == 11


def test_more_bad_members_than_allowed_end_the_run(tmp_path: Path) -> None:
    members = {**people("ann"), "bob/0.png": b"text", "bob/1.png": b""}
    dataset = ZippedFaces(pack(tmp_path / "a.zip", members), size=8, max_bad=1)
    with pytest.raises(ValueError, match="at most max_bad = 1 images may be unreadable, got 2"):
        dataset[2]


@pytest.mark.parametrize(
    ("method", "flag", "said"), [(zipfile.ZIP_BZIP2, 0, "method 12"), (STORED, 1, "encrypted")]
)
def test_members_of_another_kind_are_refused_by_name(
    tmp_path: Path, method: int, flag: int, said: str
) -> None:
    file = pack(tmp_path / "a.zip", people("ann", each=1), method)
    data = bytearray(file.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= flag
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"not encrypted, got ann/0\.png in .*a\.zip") as error:
        ZippedFaces(file)
    assert said in str(error.value)
    assert not list(tmp_path.glob("*.index"))


def test_absent_and_empty_archives_are_refused(tmp_path: Path) -> None:
    for root in (tmp_path / "no.zip", tmp_path):
        with pytest.raises(ValueError, match=r"^no \.zip archive .*; expected <identity>/"):
            ZippedFaces(root)
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^cannot read archive .*a\.zip: File is not a zip file"):
        ZippedFaces(tmp_path)
    pack(tmp_path / "a.zip", {"loose.png": png(0, 0)})
    with pytest.raises(ValueError, match=r"^no <identity>/<image>\.jpg in .*a\.zip"):
        ZippedFaces(tmp_path)


def test_an_archive_cut_anywhere_is_refused_by_name(tmp_path: Path) -> None:
    file = pack(tmp_path / "a.zip", people("ann", "bob"))
    whole = file.read_bytes()
    for length in range(0, len(whole), 11):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"^cannot read archive .*a\.zip: "):
            ZippedFaces(file)


def outcome(file: Path) -> str | None:
    """Why an archive's images cannot all be served, if so."""
    try:
        dataset = ZippedFaces(file, size=8)
        for i in range(len(dataset)):
            dataset[i]
    except ValueError as error:
        return str(error)
    return None


def test_a_damaged_table_is_refused_or_its_images_are_bad(tmp_path: Path) -> None:
    """Any byte of the table of contents changed: one sentence with the archive, or bad images."""
    file = pack(tmp_path / "a.zip", {**people("ann"), "ümit/0.png": png(1, 0)}, DEFLATED)
    whole = file.read_bytes()
    refused = 0
    for at in range(whole.index(b"PK\x01\x02"), len(whole)):
        for flip in (1, 0x80):
            damaged = file.with_name(f"{at}-{flip}.zip")
            damaged.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
            refused += (said := outcome(damaged)) is not None
            assert said is None or str(damaged) in said, at
    assert refused > 50


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow), None])
def test_workers_read_alike_and_count_together(tmp_path: Path, context: str | None) -> None:
    members = people("ann", "bob", "cem")
    members["bob/0.png"] = b"text"
    dataset = ZippedFaces(pack(tmp_path / "a.zip", members, DEFLATED), size=8)
    assert dataset[0]  # its map is open already
    loader = DataLoader(
        dataset, 2, num_workers=2 if context else 0, multiprocessing_context=context
    )
    reds = torch.cat([images[:, 0, 0, 0] for images, _ in loader])
    assert reds.tolist() == [0, 0, 1, 1, 2, 2]
    assert dataset.bad_images() == [f"{tmp_path}/a.zip/bob/0.png"]


def test_a_pickle_holds_no_archive(tmp_path: Path) -> None:
    dataset = ZippedFaces(pack(tmp_path / "a.zip", {"ann/0.bmp": bytes(10**6), **people("bob")}))
    dataset.bad = torch.zeros(3, dtype=torch.uint8)
    dataset.encoded(0)  # opens the archive
    data = pickle.dumps(dataset)
    assert len(data) < 5000
    assert torch.equal(pickle.loads(data)[1][0], dataset[1][0])


def test_archives_and_folders_of_one_place_do_not_take_each_others_index(tmp_path: Path) -> None:
    root = tmp_path / "faces"
    (root / "ann").mkdir(parents=True)
    (root / "ann" / "0.png").write_bytes(png(0, 0))
    pack(root / "a.zip", people("bob", "cem"))
    for _ in range(2):
        assert len(IdentityFolder(root)) == 1
        assert len(ZippedFaces(root)) == 4


def test_a_member_cannot_lead_out_or_take_all_memory(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    face = encode_jpeg(np.zeros((8, 8, 3), np.uint8))
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        for name in ("ann/1.jpg", "x/../2.jpg", "/3.jpg"):
            opened.writestr(name, face)
        opened.writestr("ann/bomb.jpg", bytes(1 << 27))
    faces = ZippedFaces(archive, size=8)
    assert faces.identities == ["ann"] and len(faces) == 2
    with pytest.raises(ValueError, match="must be at most 67108864 bytes, got 134217728"):
        faces.encoded(1)
