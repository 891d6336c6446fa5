"""One archive of small files: how they travel between a coordinator and a worker.

Invariant: an archive holds plain files and nothing else; what would leave the folder that it is
unpacked into, or write through a link, is refused before anything is written. Files come in the
order in which they were written, so that the one that says "complete" is the last to be there.
Format: tar, uncompressed. Used by ``cluster/worker.py`` and ``cluster/dask_pool.py``.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from mlx_slim.artifacts import atomic_file
from mlx_slim.cluster.jobs import LargeFile
from mlx_slim.errors import SlimError
from mlx_slim.hashing import hash_file
from mlx_slim.locks import is_temporary

MOST_BYTES = 256 * 10**6
_MOST_FILES = 100_000


def pack(
    folder: Path, names: Iterable[str], without: Sequence[str] = (), most: int = MOST_BYTES
) -> tuple[bytes, tuple[LargeFile, ...]]:
    """Return an archive, and the files that are too large for it, the largest ones.

    Args:
        folder: What the names are relative to.
        names: Files and folders; those that are not there are left out.
        without: Names of files and folders below them that are left out.
        most: Bytes of all files in the archive.
    """
    files = {path for name in names for path in _files(folder / name, without)}
    by_size = sorted(files, key=lambda path: (path.stat().st_size, str(path)))
    total, small, large = 0, [], []
    for path in by_size:
        total += path.stat().st_size
        (small if total <= most else large).append(path)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(small, key=lambda path: (path.stat().st_mtime_ns, str(path))):
            member = tarfile.TarInfo(path.relative_to(folder).as_posix())
            data = path.read_bytes()
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    stayed = [
        LargeFile(path.relative_to(folder).as_posix(), path.stat().st_size, hash_file(path))
        for path in sorted(large)
    ]
    return buffer.getvalue(), tuple(stayed)


def _files(path: Path, without: Sequence[str]) -> Iterator[Path]:
    if path.is_symlink() or path.name in without or is_temporary(path.name):
        return
    if path.is_file():
        yield path
    elif path.is_dir():
        for entry in path.iterdir():
            yield from _files(entry, without)


def unpack(data: bytes, folder: Path, names: Sequence[str]) -> list[Path]:
    """Write the files of an archive into ``folder``; return their paths.

    Args:
        data: The archive.
        folder: Made where it is not there.
        names: Files and folders in it that the archive may write.

    Raises:
        SlimError: If the archive is damaged, holds anything but plain files, more than
            ``MOST_BYTES``, or a file outside ``names``; nothing is written then.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            members = archive.getmembers()
            sizes = [one.size for one in members]
            if len(members) > _MOST_FILES or sum(sizes) > MOST_BYTES or min(sizes, default=0) < 0:
                raise _refused(f"{len(members)} files are too many or too large")
            targets = [(member, _target(member, folder, names)) for member in members]
            _check_places([target for _, target in targets])
            for member, target in targets:
                content = archive.extractfile(member)
                assert content is not None  # it is a plain file
                with atomic_file(target) as temporary:
                    temporary.write_bytes(content.read())
    except (tarfile.TarError, ValueError, OverflowError) as error:  # of a bad header
        raise _refused(str(error)) from error
    return [target for _, target in targets]


def _target(member: tarfile.TarInfo, folder: Path, names: Sequence[str]) -> Path:
    """Return where a member is written.

    Raises:
        SlimError: If it may not be.
    """
    path = PurePosixPath(member.name)
    if not member.isreg():
        raise _refused(f"{member.name!r} is no plain file")
    if path.is_absolute() or ".." in path.parts or "\0" in member.name or not path.parts:
        raise _refused(f"{member.name!r} leaves the folder")
    if not any(path.is_relative_to(name) for name in names):
        raise _refused(f"{member.name!r} is not among the files of the job")
    target = folder.joinpath(*path.parts)
    if not target.parent.resolve().is_relative_to(folder.resolve()) or target.is_symlink():
        raise _refused(f"{member.name!r} would be written through a link")
    return target


def _check_places(targets: Sequence[Path]) -> None:
    """Refuse files where a folder is, or below a file.

    Raises:
        SlimError: There is one.
    """
    folders = {folder for target in targets for folder in target.parents}
    both = [target for target in targets if target in folders or target.is_dir()]
    if both := both or [folder for folder in folders if folder.is_file()]:
        raise _refused(f"{both[0].name!r} would be a file and a folder")


def _refused(why: str) -> SlimError:
    return SlimError(f"an archive of the cluster is refused: {why}", "nothing of it was written")
