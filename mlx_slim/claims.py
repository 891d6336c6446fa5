"""Who may write an output: one living process, after a dead one too, and never over other files.

Invariant: a claim is a lock that dies with its process, so what a killed command left is known to
be its own and to be dead. It is removed or gone on with; the files of anybody else never are. Two
kinds: ``run_folder`` for a folder that is filled over time and resumed (``.mlx-slim.lock`` in it
names what may stand there before the state file does), ``makes_folder`` for a command whose folder
appears whole (``.mlx-slim.json`` in it says which command made it of what). Try it:
``mlx-slim train smollm2-lora -o runs/try``, kill it at any moment, ``--resume``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from mlx_slim import locks
from mlx_slim.artifacts import (
    RECORD_FILE,
    SCHEMA_VERSION,
    check_writable,
    disk_errors,
    exists_already,
    first_missing,
    hash_json,
    parent_of,
    read_json,
    weight_sizes,
)
from mlx_slim.errors import Complete, SlimError
from mlx_slim.interrupts import undivided
from mlx_slim.reading import field, read_object

LOCK_FILE = ".mlx-slim.lock"
_SAMPLES, _BLOCK = 64, 1 << 16  # of a large file: blocks evenly spread over it, and their bytes
_P = ParamSpec("_P")
_R = TypeVar("_R")

# ------------------------------------------------------------------------------- folders of runs


@dataclass(frozen=True)
class RunKind:
    """A folder that is filled over time.

    Attributes:
        command: Who fills it.
        holds: What it holds, in messages: ``run``, ``results``, ``matrix``.
        state: The file that, once there, says what a resume must match.
        before: What may stand in the folder before that file does; names or patterns (``*``).
    """

    command: str
    holds: str
    state: str
    before: tuple[str, ...] = ()

    @property
    def article(self) -> str:
        """What stands before ``holds``."""
        return "" if self.holds.endswith("s") else "a "


@dataclass(frozen=True)
class Claim:
    """A run folder held by this process.

    Attributes:
        started: Whether it holds the state of a run to go on with.
        note: What the user should know; empty if nothing.
        descriptor: Of the lock, for a child process that is to hold the folder too.
    """

    started: bool
    note: str
    descriptor: int


_claimed: dict[str, int] = {}  # folder -> descriptor of its lock


def check_run_folder(out: Path, kind: RunKind, *, resume: bool) -> bool:
    """Return whether ``out`` holds something to go on with; nothing is written.

    Raises:
        SlimError: If it cannot be written, holds other files, or holds a start and ``resume`` is
            not given.
    """
    with disk_errors(out):  # a name that is too long, at the first look
        if out.exists() and not out.is_dir():
            raise SlimError(f"{out} is a file", f"choose a folder for the {kind.holds}")
        check_writable(out)
    if not out.exists():
        return False
    if (out / kind.state).exists():
        if not resume:
            raise SlimError(
                f"{out} holds {kind.article}{kind.holds} already",
                "go on with --resume, or choose another output folder",
            )
        return True
    _leftovers(out, kind)
    return False


@contextlib.contextmanager
def run_folder(out: Path, kind: RunKind, *, resume: bool) -> Iterator[Claim]:
    """Hold the folder ``out``; a folder that gets no state file is removed again, or emptied.

    What dead processes left is removed: temporaries anywhere in it, and, where no state file was
    written, all that ``kind.before`` of their command names.

    Args:
        out: Need not exist.
        kind: What it will be.
        resume: Go on with what is there; where there is nothing yet, begin.

    Raises:
        SlimError: As ``check_run_folder``, or if a living process holds it.
    """
    key = os.path.realpath(out)
    if key in _claimed:  # a workflow inside another one, on the same folder
        yield Claim((out / kind.state).exists(), "", _claimed[key])
        return
    check_run_folder(out, kind, resume=resume)
    lock = made = None
    started = begun = False
    try:
        with disk_errors(out), undivided():
            made = first_missing(out)
            lock = _lock(out)
            _claimed[key] = lock.descriptor
        if lock.works:
            locks.remove_dead(out)
        started = check_run_folder(out, kind, resume=resume)
        if not started:
            _begin(out, kind, lock)
            begun = True
        note = ""
        if resume and not started:
            note = f"{out} holds no {kind.holds} to resume: starting"
        yield Claim(started, note, lock.descriptor)
    finally:
        with undivided():
            if lock is not None:
                _claimed.pop(key, None)
                stays = (out / kind.state).exists()
                if begun and not stays:  # it could not start
                    for pattern in kind.before:
                        for path in out.glob(pattern):
                            _remove(path)
                lock.path.unlink(missing_ok=True)
                if made is not None and not stays:
                    _remove_if_empty(out, made)
                lock.release()


def _lock(out: Path) -> locks.Lock:
    """Make the folder ``out`` where it is not there, and lock it.

    Raises:
        SlimError: If a living process holds it, or makes a folder of that name.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.name and os.access(out.parent, os.W_OK | os.X_OK):  # "." and "/" have none
        with locks.hold(out):
            out.mkdir(exist_ok=True)
    while True:
        out.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # removed by who held it before us
            if (lock := locks.acquire(out / LOCK_FILE)) is None:
                raise locks.in_use(out)
            return lock


def _leftovers(out: Path, kind: RunKind) -> list[Path]:
    """Return what a dead process of ours left in a folder without a state file.

    Raises:
        SlimError: If anything else is in it.
    """
    try:
        where = out / LOCK_FILE
        known = field(read_object(where), str(where), "before", list, of=str)
    except SlimError:  # torn by a kill
        known = []
    entries = [path for path in out.iterdir() if not _is_apart(path.name)]
    if not all(any(fnmatchcase(path.name, name) for name in known) for path in entries):
        raise SlimError(
            f"{out} is not empty and holds no {kind.holds}", "choose another output folder"
        )
    return entries


def _is_apart(name: str) -> bool:
    """Return whether a file is no content: the lock, a temporary, what Finder leaves everywhere."""
    return name in (LOCK_FILE, ".DS_Store") or locks.is_temporary(name)


def _begin(out: Path, kind: RunKind, lock: locks.Lock) -> None:
    """Empty the folder of what a dead process left, then say what may come into it."""
    entries = _leftovers(out, kind)
    if entries and not lock.works:
        raise SlimError(
            f"{out} holds the beginning of {kind.article}{kind.holds}, and without locks nobody "
            "knows whether its process lives",
            "remove it if no other command writes it, or choose another output folder",
        )
    for path in entries:
        _remove(path)
    # In place: it is the locked file. Torn by a kill it names nothing, when nothing is there yet.
    text = json.dumps({"command": kind.command, "before": kind.before})
    os.ftruncate(lock.descriptor, 0)
    os.pwrite(lock.descriptor, text.encode(), 0)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _remove_if_empty(out: Path, made: Path) -> None:
    """Remove the folders that were made, from ``out`` up to ``made``, where nothing is in them."""
    with contextlib.suppress(OSError):
        for folder in (out, *out.parents):
            folder.rmdir()
            if folder == made:
                break


# ------------------------------------------------------------------- folders that appear whole


def makes_folder(command: str, *apart: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Hold the folder ``out`` while a function makes it, and record in it what it was made of.

    Where it is there already, made by the same command from the same inputs (their contents, not
    their places), the function is not called and ``Complete`` is raised.

    Args:
        command: Name of the command.
        apart: Parameters, besides ``out`` and ``observer``, that do not decide what is made.
    """

    def wrap(work: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(work)

        @functools.wraps(work)
        def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            out: Path = bound.arguments["out"]
            inputs = {
                name: value
                for name, value in bound.arguments.items()
                if name not in ("out", "observer", *apart)
            }
            with new_folder(out, command, inputs):
                return work(*args, **kwargs)

        return run

    return wrap


@contextlib.contextmanager
def new_folder(out: Path, command: str, inputs: dict[str, Any]) -> Iterator[None]:
    """Hold ``out``, which ``artifacts.atomic_folder`` will make; refuse one that is there.

    Raises:
        Complete: It was made by ``command`` from ``inputs``, and is whole.
        SlimError: It is there otherwise, cannot be written, or a living process makes it.
    """
    if not out.name:  # "." or "/"
        raise exists_already(out)
    with contextlib.ExitStack() as stack:
        with disk_errors(out):
            check_writable(out.parent)
            stack.enter_context(parent_of(out))
            work = stack.enter_context(locks.hold(out))
        record = {"schema_version": SCHEMA_VERSION, "command": command}
        if os.path.lexists(out):  # a link to nothing too: it can't be renamed over
            known = _record_of(out)
            weights, files = known.pop("weights", None), known.pop("files", ())
            if known == {**record, "made_of": _print(inputs, out)}:
                missing = [name for name in files if not (out / name).is_file()]
                if missing:
                    raise exists_already(out, f"{missing[0]} was removed from it")
                if weights == weight_sizes(out):
                    raise Complete(f"{out} is complete: nothing to do", out)
                raise exists_already(out, "its weights are not those that were written")
            raise exists_already(out)
        work.record.update(record, made_of=_print(inputs, out))
        yield


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold an output that is written bit by bit, as no other command may at the same time.

    Raises:
        SlimError: If a living process holds it, or its place cannot be written.
    """
    if not path.name:  # "/"
        raise exists_already(path)
    with disk_errors(path), parent_of(path), locks.hold(path):
        yield


def _record_of(out: Path) -> dict[str, Any]:
    try:
        known = read_json(out / RECORD_FILE)
    except SlimError:
        return {}
    return known if isinstance(known, dict) else {}


def _print(inputs: dict[str, Any], out: Path) -> str:
    """Return a hash of ``inputs``; files and folders count by content, ``out`` inside one not."""
    return hash_json({name: _plain(value, out) for name, value in sorted(inputs.items())})


def _plain(value: Any, out: Path) -> Any:
    if isinstance(value, (str, Path)):
        if (file := _existing(str(value))) is not None:
            return _contents(file, out)
        path, _, weight = str(value).rpartition("=")  # an adapter may be given as DIR=WEIGHT
        folder = _existing(path)
        return str(value) if folder is None else [_contents(folder, out), weight]
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    elif dump := getattr(value, "model_dump", None):
        value = dump(mode="json")
    if isinstance(value, dict):
        return {str(key): _plain(inner, out) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return [_plain(inner, out) for inner in value]
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def _existing(text: str) -> Path | None:
    with contextlib.suppress(OSError, ValueError):  # too long, or of characters no path has
        if text and (path := Path(text).expanduser()).exists():
            return path
    return None


def _contents(path: Path, out: Path) -> str | dict[str, str]:
    if path.is_file():
        return _sampled(path)
    return {
        file.relative_to(path).as_posix(): _sampled(file)
        for file in sorted(path.rglob("*"))
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and out.absolute() not in file.absolute().parents
    }


def _sampled(file: Path) -> str:
    """Return a hash of a file: all of it up to 4 MB; above, size, time of change and some blocks.

    Reading 14 GB of weights to say that nothing is to do would take a quarter of a minute. The time
    tells of a change between the blocks; a copy with another one counts as changed.
    """
    known = file.stat()
    size = known.st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as handle:
        if size <= _SAMPLES * _BLOCK:
            digest.update(handle.read())
        else:
            digest.update(f" {known.st_mtime_ns}".encode())
            for number in range(_SAMPLES):
                handle.seek(number * (size - _BLOCK) // (_SAMPLES - 1))
                digest.update(handle.read(_BLOCK))
    return digest.hexdigest()


def _forget() -> None:
    """A forked process holds nothing of its parent's: ``locks.py``."""
    _claimed.clear()


os.register_at_fork(after_in_child=_forget)
