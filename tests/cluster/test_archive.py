"""What travels is plain files; what would leave the folder is refused whole."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from mlx_slim.cluster.archive import pack, unpack
from mlx_slim.errors import SlimError
from mlx_slim.hashing import hash_bytes


def write(folder: Path, files: dict[str, bytes]) -> None:
    for when, (name, data) in enumerate(files.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path, (when, when))


def test_small_files_travel_in_the_order_written_and_large_ones_stay(tmp_path: Path) -> None:
    files = {"cell/z.txt": b"1", "cell/run/checkpoints/a": b"2", "cell/model/w": b"w" * 50}
    write(tmp_path / "here", {**files, "cell/a.json": b"{}", "other/b": b"3"})
    (tmp_path / "here/cell/link").symlink_to(tmp_path / "here/other/b")
    data, large = pack(tmp_path / "here", ["cell", "gone"], ["checkpoints"], most=10)
    paths = unpack(data, tmp_path / "there", ["cell"])
    assert [path.name for path in paths] == ["z.txt", "a.json"]
    assert (tmp_path / "there/cell/a.json").read_bytes() == b"{}"
    (one,) = large
    assert (one.path, one.bytes, one.sha256) == ("cell/model/w", 50, hash_bytes(b"w" * 50))
    with pytest.raises(SlimError, match="not among the files"):
        unpack(data, tmp_path / "there", ["cells"])


@pytest.mark.parametrize(
    ("name", "kind", "why"),
    [
        ("/etc/passwd", tarfile.REGTYPE, "leaves the folder"),
        ("cell/../../x", tarfile.REGTYPE, "leaves the folder"),
        ("cell/x", tarfile.SYMTYPE, "no plain file"),
        ("cell/x", tarfile.LNKTYPE, "no plain file"),
        ("cell/x", tarfile.FIFOTYPE, "no plain file"),
        ("cell/link/x", tarfile.REGTYPE, "through a link"),
        ("other", tarfile.REGTYPE, "not among"),
    ],
)
def test_what_would_write_elsewhere_is_refused_and_nothing_is_written(
    tmp_path: Path, name: str, kind: bytes, why: str
) -> None:
    (tmp_path / "out/cell").mkdir(parents=True)
    (tmp_path / "out/cell/link").symlink_to(tmp_path)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("cell/fine"))
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(SlimError, match=why):
        unpack(buffer.getvalue(), tmp_path / "out", ["cell"])
    with pytest.raises(SlimError, match="refused"):
        unpack(b"no archive" * 99, tmp_path / "out", ["cell"])
    assert not (tmp_path / "out/cell/fine").exists()


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("cell/a", "cell/fine"), "'fine' would be a file and a folder"),
        (("cell/a", "cell/a/b"), "'a' would be a file and a folder"),
        (("cell/a", "cell/file/b"), "'file' would be a file and a folder"),
    ],
)
def test_a_file_in_the_place_of_a_folder_is_refused_and_nothing_is_written(
    tmp_path: Path, names: tuple[str, ...], why: str
) -> None:
    (tmp_path / "out/cell/fine").mkdir(parents=True)
    (tmp_path / "out/cell/file").write_bytes(b"")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(SlimError, match=why):
        unpack(buffer.getvalue(), tmp_path / "out", ["cell"])
    assert not (tmp_path / "out/cell/a").exists()


@pytest.mark.parametrize("size", [b"\xff" * 4 + (2**64 - 10_000).to_bytes(8, "big"), b"\x80" * 12])
def test_a_size_that_no_file_has_is_refused(tmp_path: Path, size: bytes) -> None:
    data = bytearray(tarfile.TarInfo("cell/a").tobuf() + bytes(1024))
    data[124:136] = size
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    with pytest.raises(SlimError, match="archive of the cluster is refused"):
        unpack(bytes(data), tmp_path / "out", ["cell"])
