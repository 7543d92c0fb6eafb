"""Files are written whole or not at all, and told apart when they are rewritten."""

import os
from pathlib import Path

import pytest

from fastface_lightning.files import file_stamp, printable, write_text


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    file = tmp_path / "new" / "run.json"
    write_text(file, "before")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "half \udcff")
    assert file.read_text() == "before" and os.listdir(file.parent) == ["run.json"]
    write_text(file, "after")
    assert file.read_text() == "after" and os.listdir(file.parent) == ["run.json"]


def test_a_stamp_tells_a_rewritten_file(tmp_path: Path) -> None:
    file, absent = tmp_path / "a", tmp_path / "b"
    file.write_bytes(b"123")
    stamp = file_stamp(file, absent)
    assert stamp[0] == 3 and stamp[2:] == [0, 0]
    assert file_stamp(file, absent) == stamp
    os.utime(file, ns=(0, stamp[1] - 10**9))
    assert file_stamp(file, absent) == [3, stamp[1] - 10**9, 0, 0]


def test_every_name_can_be_printed() -> None:
    assert printable(os.fsdecode(b"f\xff")).encode() == b"f\\udcff"
    assert printable("Ünal\n\x1b[2J\u2028 7") == "Ünal\\n\\x1b[2J\\u2028 7"
