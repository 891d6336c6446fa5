"""Locks that die with their process, and the temporaries that carry them.

Invariant: whatever is written under a temporary name is locked by its process until it is renamed
or removed (``flock``: the kernel releases it at the process's end, SIGKILL included). So a
temporary without a lock is what a dead process left, and only that is ever removed. A process that
was forked holds nothing of its parent's; one that was executed inherits no descriptor. On a file
system without locks nothing is known to be dead: nothing is removed, and one line says so. Try it:
``python -m pytest tests/test_locks.py``.

Beside an output NAME: ``.NAME.mlx-slim-tmp/`` while a folder is built (``lock``; ``new``, the
folder to be; ``old``, the one that it replaces, whose files that the new one has not go over to it;
``gone``, one that is being removed; ``inputs``, what the new one is made of), and
``.NAME.mlx-slim-ID.EXT`` while a file is written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mlx_slim.errors import SlimError
from mlx_slim.interrupts import deferred_signals

TAG = ".mlx-slim-"
_FOLDER = re.compile(r"\.(.+)\.mlx-slim-tmp")
_FILE = re.compile(r"\.(.+)\.mlx-slim-[0-9a-f]{8}(\.[^.]*)?")
_TURN = 0.2  # seconds between looks at a lock that another process holds
_LOCK, NEW, OLD, GONE, INPUTS = "lock", "new", "old", "gone", "inputs"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)

_descriptors: set[int] = set()
_warned = False


@dataclass(frozen=True)
class Lock:
    """A file that this process has locked.

    Attributes:
        path: The file.
        descriptor: Open as long as the lock is held.
        works: False where the file system has no locks.
    """

    path: Path
    descriptor: int
    works: bool

    def release(self) -> None:
        """Let go of it; the file stays."""
        if self.descriptor in _descriptors:
            _descriptors.discard(self.descriptor)
            os.close(self.descriptor)


def acquire(path: Path) -> Lock | None:
    """Return the lock of the file ``path``, made if absent; None if a living process holds it.

    Raises:
        OSError: If the file cannot be made, for one because its folder is not there.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        works = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            works = False
            _warn(path, error)
        # Who held it before may have removed the file between our two calls.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                _descriptors.add(descriptor)
                return Lock(path, descriptor, works)
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Return whether a living process holds the lock of the file ``path``; nothing is written."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


def _warn(path: Path, error: OSError) -> None:
    global _warned
    if not _warned:
        import logging

        _warned = True
        logging.getLogger("mlx_slim").warning(
            "warning: the file system of %s has no locks (%s): two commands that write the same "
            "output are not told apart, and what a killed one left is not removed",
            path.parent,
            error.strerror,
        )


def _forget() -> None:
    """Close, in a forked process, what the parent holds: the lock must die with the parent."""
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()
    _held.clear()


# ------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """Yield a new, empty, locked file beside ``path``; it is removed, if it has its name still."""
    held: list[Lock] = []
    try:
        with deferred_signals():
            while not held:
                name = f".{path.name}{TAG}{secrets.token_hex(4)}{path.suffix}"
                if (lock := acquire(path.with_name(name))) is not None:
                    held.append(lock)
        yield held[0].path
    finally:
        with deferred_signals():
            for lock in held:
                lock.path.unlink(missing_ok=True)
                lock.release()


# ------------------------------------------------------------------------------------- folders


@dataclass
class TemporaryFolder:
    """The temporary folder of an output, held by this process.

    Attributes:
        path: The output.
        folder: ``.NAME.mlx-slim-tmp`` beside it.
        lock: On a file in ``folder``.
        record: What ``artifacts.atomic_folder`` writes into the output as ``.mlx-slim.json``.
    """

    path: Path
    folder: Path
    lock: Lock
    record: dict[str, object] = field(default_factory=dict)


_held: dict[str, TemporaryFolder] = {}


def _key(path: Path) -> str:
    return os.path.realpath(path.parent) + os.sep + path.name


@contextlib.contextmanager
def hold(path: Path) -> Iterator[TemporaryFolder]:
    """Hold the output ``path``, which need not exist; its folder must.

    What a dead process left of it is completed or removed first. Held again inside, it is the same.

    Raises:
        SlimError: If a living process holds it.
    """
    if (folder := _held.get(_key(path))) is not None:
        yield folder
        return
    try:
        with deferred_signals():
            work = _held[_key(path)] = _begin(path)
        yield work
    finally:
        with deferred_signals():
            if (held := _held.pop(_key(path), None)) is not None:
                _end(held)


def _begin(path: Path) -> TemporaryFolder:
    folder = path.with_name(f".{path.name}{TAG}tmp")
    while True:
        folder.mkdir(exist_ok=True)
        try:
            lock = acquire(folder / _LOCK)
        except FileNotFoundError:  # the one before us has just removed it
            continue
        if lock is None:
            raise in_use(path)
        work = TemporaryFolder(path, folder, lock)
        if not lock.works and {entry.name for entry in folder.iterdir()} != {_LOCK}:
            lock.release()
            raise SlimError(
                f"{folder} exists, and without file locks a process may still be writing it",
                f"remove it if no other command writes {path}",
            )
        settle(work)
        return work


@contextlib.contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Work on the output ``path`` when no other process does: wait for the one that does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name}{TAG}turn")
    while (lock := acquire(file)) is None:
        time.sleep(_TURN)
    try:
        yield
    finally:
        lock.path.unlink(missing_ok=True)
        lock.release()


def in_use(path: Path) -> SlimError:
    """Return the refusal of an output that a living process writes."""
    return SlimError(f"another process is writing {path}", "wait for it, or stop it first")


def settle(work: TemporaryFolder) -> None:
    """Finish a replacement of which the half is done, and remove what else is in the folder."""
    new, old = work.folder / NEW, work.folder / OLD
    if old.exists() and not os.path.lexists(work.path):
        # The old folder moves aside only when the new one is whole and on disk.
        (new if new.exists() else old).rename(work.path)
    for folder in (new, work.folder / GONE, work.folder / INPUTS):
        shutil.rmtree(folder, ignore_errors=True)
    if old.exists():
        with contextlib.suppress(OSError):  # no place for them: the old folder stays
            _keep_others(old, work.path)
            shutil.rmtree(old)


def _keep_others(old: Path, new: Path) -> None:
    """Move what ``old`` has and ``new`` has not into ``new``: somebody else put it there."""
    for file in sorted(old.rglob("*")):
        target = new / file.relative_to(old)
        if not os.path.lexists(target) and (file.is_symlink() or not file.is_dir()):
            target.parent.mkdir(parents=True, exist_ok=True)
            file.rename(target)


def _end(work: TemporaryFolder) -> None:
    settle(work)
    with contextlib.suppress(OSError):  # in it: somebody else's, or the next one's lock
        work.lock.path.unlink(missing_ok=True)
        work.folder.rmdir()
    work.lock.release()


# ------------------------------------------------------------------------------------- the dead


def remove_dead(folder: Path, name: str | None = None) -> None:
    """Remove the temporaries of dead processes.

    Args:
        folder: Where they lie.
        name: Those of this output alone; None takes all in ``folder`` and below it.
    """
    with contextlib.suppress(OSError):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            is_folder = entry.is_dir(follow_symlinks=False)
            kind = (_FOLDER if is_folder else _FILE).fullmatch(entry.name)
            if kind is None:
                if is_folder and name is None:
                    remove_dead(Path(entry.path))
            elif name in (None, kind[1]):
                with contextlib.suppress(OSError):  # gone meanwhile, or not ours to remove
                    _remove_if_dead(Path(entry.path), folder / kind[1], is_folder)


def is_temporary(name: str) -> bool:
    """Return whether a file or a folder is called as temporaries are."""
    return bool(_FOLDER.fullmatch(name) or _FILE.fullmatch(name))


def _remove_if_dead(temporary: Path, output: Path, is_folder: bool) -> None:
    lock = acquire(temporary / _LOCK if is_folder else temporary)
    if lock is None:
        return
    if not lock.works:
        lock.release()
    elif is_folder:
        _end(TemporaryFolder(output, temporary, lock))
    else:
        temporary.unlink(missing_ok=True)
        lock.release()


os.register_at_fork(after_in_child=_forget)
