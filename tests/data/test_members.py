"""Samples in a tar: found by their headers alone, and nothing followed that leads elsewhere."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from keye_data.errors import DataError
from keye_data.members import find_members


def write(path: Path, *entries: tarfile.TarInfo | tuple[str, bytes], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                tar.addfile(info, io.BytesIO(entry[1]))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def extent(path: Path) -> int:
    """Bytes of all samples, without the two empty blocks at the end."""
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    return last.offset_data + -(-last.size // 512) * 512


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_where_they_are_said_to_be(tmp_path, format):
    long = "deep/" * 30 + "0007"  # needs a header of its own in GNU's and POSIX's form
    names = ["json", "0.mp4.packets", "0.mp4.000.mp4", "1.png"]
    if format == tarfile.USTAR_FORMAT:
        long = "deep/0007"
    path = write(tmp_path / "a.tar", *((f"{long}.{n}", n.encode() * 300) for n in names), format=format)
    key, members = find_members(str(path), 0, extent(path))
    assert key == long and list(members) == names
    assert all(members[name].read() == name.encode() * 300 for name in names)


def test_a_sample_in_the_middle(tmp_path):
    path = write(
        tmp_path / "a.tar", *((f"{i}.{kind}", f"{i} {kind}".encode()) for i in range(3) for kind in ("a", "b"))
    )
    key, members = find_members(str(path), 2048, 2048)
    assert key == "1" and {name: place.read() for name, place in members.items()} == {"a": b"1 a", "b": b"1 b"}
    with pytest.raises(DataError, match="members of '1' and '2'") as error:
        find_members(str(path), 2048, 4096)
    assert error.value.reason == "unreadable shard"


def test_links_and_devices_are_passed_over(tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    entries = [
        special("0.a", tarfile.SYMTYPE, str(tmp_path / "secret")),
        special("0.b", tarfile.LNKTYPE, "0.json"),
        special("0.c", tarfile.CHRTYPE),
        special("0.d", tarfile.FIFOTYPE),
        special("0.e", tarfile.DIRTYPE),
    ]
    path = write(tmp_path / "a.tar", *entries, ("0.json", b"{}"))
    assert list(find_members(str(path), 0, extent(path))[1]) == ["json"]
    path = write(tmp_path / "b.tar", *entries)
    with pytest.raises(DataError, match="no plain file"):
        find_members(str(path), 0, extent(path))


@pytest.mark.parametrize("name", ["../0.json", "a/../../0.json", "/etc/0.json"])
def test_names_that_lead_out_are_refused(tmp_path, name):
    path = write(tmp_path / "a.tar", (name, b"{}"))
    with pytest.raises(DataError, match="leads out of the shard") as error:
        find_members(str(path), 0, extent(path))
    assert error.value.reason == "unsafe name"


def test_damaged_headers_are_an_unreadable_shard(tmp_path):
    path = write(tmp_path / "a.tar", ("0.json", b"{}"), ("0.mp4", b"film" * 200))
    whole, size = path.read_bytes(), extent(path)
    huge = bytearray(whole)
    huge[1024 + 124 : 1024 + 136] = b"00777777777\0"  # the film's size, and its checksum put right
    huge[1024 + 148 : 1024 + 156] = b" " * 8
    huge[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(huge[1024:1536])
    cases = {
        "headers end": whole[:1024] + b"\xff" * 512 + whole[1536:],
        "headers end before": whole[:1024],
        "speaks of 134217727 bytes": bytes(huge),
        "the file ends inside": whole[:1700],
        "empty file": b"",
        "invalid header": b"junk" * 1000,
    }
    for said, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(DataError, match=said.strip()) as error:
            find_members(str(path), 0, size)
        assert error.value.reason == "unreadable shard", said
    with pytest.raises(DataError, match="FileNotFoundError"):
        find_members(str(tmp_path / "none.tar"), 0, size)
