"""End a process right before its n-th moment, and compare what two folders hold.

Moments are what ``Watch.point`` is told, and the file operations that CPython announces to audit
hooks: making a folder, opening a file for writing, renaming, removing, cutting short. MLX's own
writers announce nothing: the next operation after them is one of these. Used by
``tests/test_locks.py`` and ``tests/test_kills.py``.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """Counts file operations under ``folders``; ends the process before one of them.

    Args:
        folders: What is watched.
        limit: Number of the operation, from 0, that does not happen any more; None ends nothing.
        number: The signal that is sent then; one that can be handled comes once.
    """

    def __init__(
        self, folders: list[Path], limit: int | None = None, number: int = signal.SIGKILL
    ) -> None:
        self.folders = [folder.resolve() for folder in folders]
        self.limit, self.number = limit, number
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if event != "open" and event not in _CHANGES:
            return
        path, *rest = arguments
        if event == "open" and not (isinstance(rest[1], int) and rest[1] & _WRITES):
            return
        # Relative to a descriptor (shutil.rmtree), or a descriptor itself: watched wherever it is.
        beside = event in ("os.remove", "os.rmdir") and rest[0] >= 0
        if not isinstance(path, (str, bytes, os.PathLike)):
            path, beside = "", event == "os.truncate"
        path = Path.cwd() / os.fsdecode(path)
        if not beside and not any(path.is_relative_to(folder) for folder in self.folders):
            return
        self.point(f"{event} {path.name}")

    def point(self, name: str) -> None:
        """Count a moment; send the signal if it is the one."""
        self.seen.append(name)
        if len(self.seen) - 1 == self.limit:
            os.kill(os.getpid(), self.number)


def run_forked(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked process; return its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return path -> content of everything in ``folder``, hidden names too; None for a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def temporaries(names: Iterable[str]) -> list[str]:
    """Return the temporaries and locks among ``names``."""
    return [name for name in names if "mlx-slim-" in name or name.endswith(".lock")]


def announce_events(watch: Watch) -> None:
    """Make a moment of each event that the console hears of; of several alike the first is one."""
    from mlx_slim.console import Console

    hear = Console.notify

    def notify(self: Console, event: Any) -> None:
        if watch.seen[-1:] != [moment := f"event {event.name}"]:
            watch.point(moment)
        hear(self, event)

    Console.notify = notify  # type: ignore[method-assign]


def name_modules(file: Path) -> None:
    """Write down what this process has imported."""
    file.write_text("\n".join(name for name in list(sys.modules) if "__" not in name))


def import_modules(file: Path) -> None:
    """Import here, once, what a run has imported while it ran."""
    for name in file.read_text().splitlines():
        with contextlib.suppress(Exception):  # what only a half of a package can import
            importlib.import_module(name)


# ------------------------------------------------------------------------------- what may differ

_TIMES = re.compile(
    r"(seconds|tokens_per_second|peak_memory_bytes|active_memory_bytes|\w*_seconds|minutes"
    r"|eval_peak_memory_bytes|attempts"  # of a trial: how often it was started
    r"|cache_bytes|budget_bytes)"  # the memory that was free
)
# Pages and tables that are made of the cells' records, times among them.
_PAGES = ("report.html", "report.md", "results.csv")


def comparable(name: str, content: bytes | None) -> Any:
    """Return what of a file must be equal."""
    if content is None or name.endswith((".safetensors", ".bin", ".npy", ".gguf")):
        return content
    if name.rsplit("/", 1)[-1] in _PAGES:
        return "a page"
    if name.endswith("study.db"):  # it knows what was killed; sweep.json says what came of it
        return "a study"
    if name.endswith("models/hashes.json"):  # it knows files by their time besides
        return {key: entry["sha256"] for key, entry in json.loads(content).items()}
    if name.endswith(".json"):
        return _without_times(json.loads(content))
    if name.endswith("metrics.jsonl"):
        records = map(json.loads, content.splitlines())
        return [_without_times(record) for record in records if record["event"] != "resumed"]
    if name.endswith("progress.jsonl"):
        return [_without_times(json.loads(line)) for line in content.splitlines()]
    return content


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if not _TIMES.fullmatch(k)}
    return [_without_times(inner) for inner in value] if isinstance(value, list) else value
