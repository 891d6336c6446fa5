"""Outputs that appear whole: one living process makes each, and none overwrites other files.

Invariant: a claim is a lock that dies with its process, and ``.mlx-slim.json`` in a folder says
which command made it of what; a folder of anything else is never touched. Folders that are filled
over time and resumed are in ``run_dir.py``. Try it: ``mlx-slim quantize MODEL -o DIR``, twice.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from mlx_slim import locks
from mlx_slim.artifacts import (
    RECORD_FILE,
    SCHEMA_VERSION,
    check_writable,
    disk_errors,
    exists_already,
    hash_json,
    parent_of,
    read_json,
    weight_sizes,
)
from mlx_slim.errors import Complete, SlimError
from mlx_slim.reading import JsonObject

LOCK_FILE = ".mlx-slim.lock"
_SAMPLES, _BLOCK = 64, 1 << 16  # of a large file: blocks evenly spread over it, and their bytes
_P = ParamSpec("_P")
_R = TypeVar("_R")

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
def new_folder(out: Path, command: str, inputs: JsonObject) -> Iterator[None]:
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
            existing = _record_of(out)
            weights, files = existing.pop("weights", None), existing.pop("files", ())
            if existing == {**record, "made_of": _print(inputs, out)}:
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


def _record_of(out: Path) -> JsonObject:
    try:
        existing = read_json(out / RECORD_FILE)
    except SlimError:
        return {}
    return existing if isinstance(existing, dict) else {}


def _print(inputs: JsonObject, out: Path) -> str:
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
    status = file.stat()
    size = status.st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as handle:
        if size <= _SAMPLES * _BLOCK:
            digest.update(handle.read())
        else:
            digest.update(f" {status.st_mtime_ns}".encode())
            for number in range(_SAMPLES):
                handle.seek(number * (size - _BLOCK) // (_SAMPLES - 1))
                digest.update(handle.read(_BLOCK))
    return digest.hexdigest()
