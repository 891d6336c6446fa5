"""Folders that a command fills over time and resumes: who may write one, and how it is resumed.

Invariant: a claim is a lock that dies with its process, so the files of a killed command are
recognised as its own and as dead: they are removed or the run is resumed; files of anybody else are
never touched. ``.mlx-slim.lock`` names what may be in the folder before its state file. A folder
that gets no state file is removed again. Used by train, distill, prune, eval and compare. Try it:
``mlx-slim train smollm2-lora -o runs/try``, kill it at any moment, ``--resume``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlx_slim import locks
from mlx_slim.artifacts import check_writable, disk_errors, first_missing
from mlx_slim.errors import Interrupted, SlimError
from mlx_slim.interrupts import deferred_signals
from mlx_slim.ranks.state import resumed_by
from mlx_slim.reading import field, read_object, short

LOCK_FILE = ".mlx-slim.lock"


@dataclass(frozen=True)
class RunKind:
    """What a command fills a folder with.

    Attributes:
        command: Who fills it.
        holds: What it holds, in messages: ``run``, ``results``, ``matrix``.
        state: The file that, once there, says what a resume must match.
        before: What may be in the folder before that file; names or patterns (``*``).
    """

    command: str
    holds: str
    state: str
    before: tuple[str, ...] = ()

    @property
    def article(self) -> str:
        """The article before ``holds``, in messages."""
        return "" if self.holds.endswith("s") else "a "


@dataclass(frozen=True)
class ClaimedDir:
    """A run folder that this process holds.

    Attributes:
        started: Whether it holds the state of a run to resume.
        note: What the user should know; empty if nothing.
        descriptor: Of the lock, for a child process that is to hold the folder too.
        nested: Whether a workflow around this one holds it already.
    """

    started: bool
    note: str
    descriptor: int
    nested: bool = False


_claimed: dict[str, int] = {}  # folder -> descriptor of its lock


@dataclass(frozen=True)
class RunDir:
    """A folder that is filled over time.

    Attributes:
        path: Need not exist.
        kind: What it is filled with.
    """

    path: Path
    kind: RunKind

    @property
    def started(self) -> bool:
        """Whether the state file is there, so that the run can be resumed."""
        return (self.path / self.kind.state).exists()

    def check(self, *, resume: bool) -> bool:
        """Return whether there is a run to resume; nothing is written.

        Raises:
            SlimError: If the folder cannot be written, holds other files, or holds a run and
                ``resume`` is not given.
        """
        out, kind = self.path, self.kind
        with disk_errors(out):  # a name that is too long, at the first look
            if out.exists() and not out.is_dir():
                raise SlimError(f"{out} is a file", f"choose a folder for the {kind.holds}")
            check_writable(out)
        try:
            str(out).encode()
        except UnicodeEncodeError as error:
            raise SlimError(
                f"{str(out)!r} is not valid UTF-8", "choose another output folder"
            ) from error
        if not out.exists():
            return False
        if self.started:
            if not resume:
                raise SlimError(
                    f"{out} holds {kind.article}{kind.holds} already",
                    "resume with --resume, or choose another output folder",
                )
            return True
        _leftovers(out, kind)
        return False

    @contextlib.contextmanager
    def claim(
        self, *, resume: bool, match: Callable[[], None] | None = None
    ) -> Iterator[ClaimedDir]:
        """Hold the folder; one that gets no state file is removed again, or emptied.

        What dead processes left is removed: temporaries anywhere in it, and, where no state file
        was written, all that ``kind.before`` of their command names.

        Args:
            resume: Resume what is there; where there is nothing yet, start.
            match: Called where a run is resumed: refuses one that was started otherwise.

        Raises:
            SlimError: As ``check`` and ``match``, or if a living process holds the folder.
        """
        out, kind = self.path, self.kind
        key = os.path.realpath(out)
        if key in _claimed:  # a workflow inside another one, on the same folder
            if self.started and match is not None:
                match()
            yield ClaimedDir(self.started, "", _claimed[key], nested=True)
            return
        self.check(resume=resume)
        lock = missing = None
        started = begun = False
        try:
            with disk_errors(out), deferred_signals():
                missing = first_missing(out)
                lock = _lock(out)
                _claimed[key] = lock.descriptor
            if lock.works:
                locks.remove_dead(out)
            started = self.check(resume=resume)
            note = ""
            if not started:
                _begin(out, kind, lock)
                begun = True
                note = f"{out} holds no {kind.holds} to resume: starting" if resume else ""
            elif match is not None:
                match()
            yield ClaimedDir(started, note, lock.descriptor)
        finally:
            with deferred_signals():
                if lock is not None:
                    _claimed.pop(key, None)
                    if begun and not self.started:  # it could not start
                        for pattern in kind.before:
                            for path in out.glob(pattern):
                                _remove(path)
                    lock.path.unlink(missing_ok=True)
                    if missing is not None and not self.started:
                        _remove_if_empty(out, missing)
                    lock.release()

    def resume_command(self, words: Sequence[str]) -> str:
        """Return the command line that resumes the run.

        Args:
            words: Of the command that started it, without the output folder.
        """
        return shlex.join(["mlx-slim", *words, "-o", str(self.path), "--resume"])

    @contextlib.contextmanager
    def resumable(
        self, words: Callable[[], Sequence[str]], message: str = "", *inside: RunDir
    ) -> Iterator[None]:
        """Tell a user who interrupts what is inside how to resume.

        Args:
            words: Returns those of ``resume_command``.
            message: In place of "stopped; what is complete is kept in FOLDER".
            inside: Folders in this one that have state files of their own.

        Raises:
            Interrupted: On Ctrl-C once there is a state file, and in place of an ``Interrupted``
                that is raised inside, whose message stays.
            KeyboardInterrupt: On Ctrl-C before: nothing is kept.
        """
        folders = (self, *inside)

        def resume() -> str:
            return self.resume_command(words()) if any(one.started for one in folders) else ""

        try:
            with resumed_by(resume):
                yield
        except Interrupted as stop:
            raise Interrupted(stop.message, self._hint(words)) from stop
        except KeyboardInterrupt as stop:
            if not any(one.started for one in folders):
                raise
            text = message or f"stopped; what is complete is kept in {self.path}"
            raise Interrupted(text, self._hint(words)) from stop

    def _hint(self, words: Callable[[], Sequence[str]]) -> str:
        return f"resume with: {self.resume_command(words())}"


def option_words(options: Any) -> list[str]:
    """Return the command-line words of a dataclass of options, those that are not the default.

    ``True`` gives ``--name``, ``False`` gives ``--no-name``, a list its option several times.
    """
    words: list[str] = []
    for one in fields(options):
        value, name = getattr(options, one.name), one.name.replace("_", "-")
        if value == one.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
            continue
        for item in value if isinstance(value, (list, tuple)) else [value]:
            words += [f"--{name}", str(item)]
    return words


def changed_values(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return ``key: old → new`` of every value that differs, for the refusal of a resume."""
    return [
        f"{key}: {short(repr(old.get(key)))} → {short(repr(new.get(key)))}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]


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
        patterns = field(read_object(where), str(where), "before", list, of=str)
    except SlimError:  # torn by a kill
        patterns = []
    entries = [path for path in out.iterdir() if not _is_apart(path.name)]
    if not all(any(fnmatchcase(path.name, name) for name in patterns) for path in entries):
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
            f"{out} holds the beginning of {kind.article}{kind.holds}, and without file "
            "locks a process may still be writing it",
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


def _remove_if_empty(out: Path, missing: Path) -> None:
    """Remove ``out`` and the folders around it, up to ``missing``, that are empty."""
    with contextlib.suppress(OSError):
        for folder in (out, *out.parents):
            folder.rmdir()
            if folder == missing:
                break


def _forget() -> None:
    """A forked process holds nothing of its parent's: ``locks.py``."""
    _claimed.clear()


os.register_at_fork(after_in_child=_forget)
