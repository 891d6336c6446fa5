"""Files that are either whole or absent, and where they came from.

Invariant: every write goes to a temporary neighbour first, is flushed to disk, and is renamed over
the target; a kill at any moment leaves the old file or the new one, and a temporary that the next
write of the same output removes (``locks.py``). A folder is built under a temporary name and
renamed. ``run.json`` is written last: its presence means the run is complete.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mlx_slim import locks, reading
from mlx_slim.errors import SlimError, file_size_limit, refuse_full_disk
from mlx_slim.hashing import hash_bytes as hash_bytes
from mlx_slim.hashing import hash_file as hash_file
from mlx_slim.hashing import hash_files as hash_files
from mlx_slim.hashing import hash_json as hash_json
from mlx_slim.interrupts import finished_first
from mlx_slim.reading import JsonObject
from mlx_slim.reading import read_json as read_json  # what ``write_json`` wrote
from mlx_slim.tensor_files import safetensors_header

if TYPE_CHECKING:
    import mlx.core as mx

SCHEMA_VERSION = 1
RECORD_FILE = ".mlx-slim.json"  # in a folder that one command made: which, and of what
_PACKAGES = ("mlx-slim", "mlx", "mlx-lm", "transformers", "tokenizers", "numpy")
_REFUSED = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
_BLOCK = 1_024  # JSON lines that are parsed at once


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, an unwritable place or a name that is too long into one clear line."""
    try:
        yield
    except OSError as error:
        refuse_full_disk(error, f" while writing {path}", "nothing was replaced")
        if error.errno == errno.ENAMETOOLONG:
            raise SlimError(
                f"cannot write {path}: {error.strerror}",
                "choose a shorter name: it is written under a temporary name about 20 bytes longer",
            ) from error
        if error.errno in _REFUSED or _of_its_place(error, path):
            raise SlimError(
                f"cannot write {path}: {error.strerror}", "choose a writable output folder"
            ) from error
        raise


def _of_its_place(error: OSError, path: Path) -> bool:
    """Return whether it is about an output or its temporary: in /proc, that it does not exist."""
    named = Path(str(error.filename))
    return named in (path, *path.parents) or locks.is_temporary(named.name)


def first_missing(path: Path) -> Path | None:
    """Return the topmost folder that making ``path`` would create; None if it exists."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    return missing[-1] if missing else None


def check_writable(path: Path) -> None:
    """Refuse a folder that exists and cannot be written, or that cannot be made.

    Raises:
        SlimError: Says why.
    """
    parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not parent.is_dir():
        raise SlimError(f"cannot write {path}: {parent} is a file", "choose another output folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise SlimError(
            f"cannot write {path}: {parent} is read-only or not yours",
            "choose a writable output folder",
        )


def fsync(descriptor: int) -> None:
    """Return once an open file is on the storage medium.

    macOS's ``fsync`` stops at the drive's cache; ``F_FULLFSYNC`` empties that too. File systems
    that refuse it (network drives, FAT) get the plain call.
    """
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path``: it becomes ``path`` on success, else is removed.

    What dead processes left of earlier tries is removed.

    Args:
        path: The file to write.
        replace: Replace an existing file; otherwise one is an error, also one that appears while
            this one is written.

    Raises:
        ResourceError: If the disk is full.
        SlimError: If the folder cannot be written, or ``path`` exists.
    """
    with finished_first(), disk_errors(path):
        if not replace and os.path.lexists(path):
            raise exists_already(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        locks.remove_dead(path.parent, path.name)
        with locks.temporary_file(path) as temporary:
            yield temporary
            _fsync(temporary)
            if replace:
                temporary.replace(path)
            else:
                try:
                    _place(temporary, path)
                except FileExistsError as error:
                    raise exists_already(path, "another command created it meanwhile") from error
            _fsync(path.parent)


def _place(temporary: Path, path: Path) -> None:
    """Give a file a name that nothing has; a rename would replace what has it."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links (exFAT)
        path.touch(exist_ok=False)
        temporary.replace(path)


@contextlib.contextmanager
def parent_of(path: Path) -> Iterator[None]:
    """Make the folder that ``path`` will lie in; remove what was made if the work fails."""
    first_folder = first_missing(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        if first_folder is not None:
            folder = path.parent
            with contextlib.suppress(OSError):  # not empty: somebody else's
                while folder != first_folder.parent:
                    folder.rmdir()
                    folder = folder.parent
        raise


@contextlib.contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` on success, and is removed on failure.

    Args:
        path: The folder to create.
        replace: Replace an existing folder; otherwise an existing one is an error, also one that
            appears while this one is built.

    Raises:
        ResourceError: If the disk is full.
        SlimError: If ``path`` exists, cannot be written, or another process writes it.
    """
    with finished_first(), disk_errors(path), parent_of(path), locks.hold(path) as work:
        if path.exists() and not replace:
            raise exists_already(path)
        new = work.folder / locks.NEW
        try:
            new.mkdir()
            yield new
            if work.record:
                contents = {"files": _files(new), "weights": weight_sizes(new)}
                write_json(new / RECORD_FILE, {**work.record, **contents})
            for file in new.rglob("*"):
                if file.is_file():
                    _fsync(file)
            if replace and path.exists():
                path.rename(work.folder / locks.OLD)
            try:
                new.rename(path)  # never replaces a file, or a folder with anything in it
            except OSError as error:
                if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise exists_already(path, "another command created it meanwhile") from error
                raise
            _fsync(path.parent)
        finally:
            locks.settle(work)


def remove_folder(path: Path, names: Iterable[str]) -> bool:
    """Remove a folder in one step: a kill leaves all of it, or a temporary.

    Args:
        path: The folder.
        names: All that we ever write into it; one that holds anything else stays as it is.

    Returns:
        Whether it is removed.
    """
    if not path.is_dir() or {entry.name for entry in path.iterdir()} - {*names, ".DS_Store"}:
        return False
    with disk_errors(path), locks.hold(path) as work:
        path.rename(work.folder / locks.GONE)
    return True


def exists_already(path: Path, why: str = "") -> SlimError:
    """Return the refusal of an output that is there."""
    text = f"{path} exists already{f': {why}' if why else ''}"
    return SlimError(text, "choose another output, or remove it first")


def _files(folder: Path) -> list[str]:
    """Return the paths of all files in ``folder``, inside it."""
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(names)


def weight_sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each file of weights in ``folder``, by its path inside."""
    return {
        file.relative_to(folder).as_posix(): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.suffix in (".safetensors", ".gguf")
    }


def write_text(path: Path, text: str, *, replace: bool = True) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8; see ``atomic_file``."""
    with atomic_file(path, replace=replace) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, replace: bool = True) -> None:
    """Write ``value`` to ``path`` atomically, as indented JSON with a last newline."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_text(path, text, replace=replace)


def save_tensors(path: Path, tensors: dict[str, mx.array]) -> None:
    """Write arrays (float or integer, evaluated here) as safetensors; not atomic by itself.

    The same arrays give the same bytes, in whatever order they come.

    Raises:
        ResourceError: If the disk is full.
        SlimError: If the file cannot be written.
    """
    import mlx.core as mx

    try:
        mx.save_safetensors(str(path), dict(sorted(tensors.items())), metadata={"format": "mlx"})
    except RuntimeError as error:  # MLX's writer names no errno
        needed = sum(value.nbytes for value in tensors.values())
        number = errno.EFBIG if needed > (file_size_limit() or needed) else None
        if shutil.disk_usage(path.parent).free < needed:
            number = errno.ENOSPC
        place = f" while writing {path.name} ({needed:,} bytes)"
        if number is not None:
            refuse_full_disk(OSError(number, str(error)), place, "nothing was replaced")
        raise SlimError(
            f"cannot write {path.name}: {' '.join(str(error).split())}",
            "check the disk's free space and that it is writable",
        ) from error


def load_tensors(path: Path) -> dict[str, mx.array]:
    """Return the arrays of a safetensors file, unread until they are evaluated.

    Raises:
        SlimError: If the file is missing or damaged.
    """
    import mlx.core as mx

    safetensors_header(path)
    with reading.library_errors(f"{path} is damaged"):
        return cast("dict[str, mx.array]", mx.load(str(path)))


def json_lines(source: Path | bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line with its line feed) of JSON lines, in a file or in memory.

    A line ends at a line feed and nowhere else. ``str.splitlines`` and text files also cut at
    characters that may stand inside a line: U+2028, U+2029 and U+0085 in a string, a carriage
    return between two values.
    """
    opened = io.BytesIO(source) if isinstance(source, bytes) else reading.open_regular(source)
    with opened as handle:
        yield from enumerate(handle, 1)


def read_records(path: Path) -> Iterator[JsonObject]:
    """Yield the objects of a file of JSON lines that this package wrote, one a line.

    Raises:
        SlimError: If the file cannot be read, or a line is not a JSON object; names the
            line.
    """
    lines = json_lines(path)
    with reading.library_errors(f"{path} cannot be read"):
        while block := list(islice(lines, _BLOCK)):
            try:
                # Many lines at once: three times as fast as one after the other.
                text = b"[" + b",".join(line for _, line in block) + b"]"
                records = reading.parse_json(text, "", halves=True)
            except SlimError:
                records = []
            if len(records) != len(block) or not all(type(r) is dict for r in records):
                records = (_record(path, *line) for line in block)
            yield from records


def _record(path: Path, number: int, line: bytes) -> JsonObject:
    record = reading.parse_json(
        line, f"{reading.short(path)}, line {number} is damaged: it", halves=True
    )
    if type(record) is not dict:
        raise SlimError(f"{path}, line {number} is not a JSON object")
    return record


def is_hub_id(name: str) -> bool:
    """Return whether ``name`` looks like ``owner/name`` and is no path that exists."""
    return (
        name.count("/") == 1 and not reading.exists(Path(name)) and not name.startswith((".", "/"))
    )


def public_name(source: str | Path) -> str:
    """Return a hub id as it is, of a path its last part: what others may read of this machine."""
    return str(source) if is_hub_id(str(source)) else Path(source).name


def provenance() -> JsonObject:
    """Return the versions and the platform that made an artifact; nothing about the user."""
    from importlib import metadata  # half of what this module would take to import

    versions: dict[str, str] = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }
