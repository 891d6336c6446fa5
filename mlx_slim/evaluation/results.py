"""The output folder of an evaluation: written chunk by chunk, exact after a kill.

Invariant: a chunk of questions is on disk whole, with its line in ``progress.jsonl``, or it counts
as never computed. A resume truncates ``samples_<task>.jsonl`` to the last whole chunk and
continues, so the finished file is that of an uninterrupted run, byte for byte; so is
``results.json``, except for ``seconds``. Try it: ``mlx-slim eval MODEL --task openbookqa -o OUT``,
kill it, ``--resume``.

Files: ``eval.json`` (at the start: what a resume must match), ``samples_<task>.jsonl`` and
``progress.jsonl`` (streamed, flushed to disk a chunk at a time), ``timings.json`` (what differs
from machine to machine), then ``results.json`` (its presence means complete).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mlx_slim.artifacts import (
    disk_errors,
    fsync,
    hash_bytes,
    json_lines,
    read_json,
    read_records,
    write_json,
)
from mlx_slim.data.fingerprint import fingerprint_difference
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.records import EvalResults, EvalState
from mlx_slim.evaluation.tasks.metrics import Record
from mlx_slim.reading import JsonObject, field, parse_json, read_bytes, read_object, short
from mlx_slim.run_dir import RunDir, RunKind

STATE_FILE = "eval.json"
PROGRESS_FILE = "progress.jsonl"
TIMINGS_FILE = "timings.json"
RESULTS_FILE = "results.json"
RESULTS = RunKind("eval", "results", STATE_FILE, (PROGRESS_FILE, "samples_*.jsonl"))


@dataclass(frozen=True)
class Entry:
    """One whole chunk on disk: a line of ``progress.jsonl``.

    Attributes:
        task: Its task.
        chunk: Number of the chunk in the task, from 0.
        end: Bytes of the samples file after it.
        sha256: Of the chunk's own bytes.
        tokens_computed: Tokens that went through the model, those of ``root`` not counted.
        tokens_minimum: The fewest possible, every distinct prefix once, likewise.
        truncated: Requests cut on the left to the model's longest input.
        root: Tokens that begin all its requests, computed once for all chunks of ``group``.
        group: The subject, or the empty string.
        seconds: Wall time of the chunk.
        peak_memory_bytes: MLX peak so far.
    """

    task: str
    chunk: int
    end: int
    sha256: str
    tokens_computed: int
    tokens_minimum: int
    truncated: int
    root: int
    group: str
    seconds: float
    peak_memory_bytes: int


def samples_name(task: str) -> str:
    """Return ``samples_<task>.jsonl``."""
    return f"samples_{task}.jsonl"


def encode(records: Sequence[Record]) -> bytes:
    """Return records as JSON lines, UTF-8; floats as ``repr`` gives them, so nothing is rounded."""
    lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records]
    return "".join(line + "\n" for line in lines).encode()


def read_samples(path: Path) -> list[Record]:
    """Return the records of a samples file.

    Raises:
        SlimError: If the file is missing, or a line is no JSON object.
    """
    try:
        return list(read_records(path))
    except SlimError as error:
        raise SlimError(error.message, "score the model again") from error


class Folder:
    """One model's results, while they are written. Only one process writes a folder at a time.

    Args:
        path: The output folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, list[Entry]] = {}

    @property
    def complete(self) -> bool:
        """Whether ``results.json`` is there."""
        return (self.path / RESULTS_FILE).exists()

    @contextlib.contextmanager
    def open(self, state: EvalState, started: bool) -> Iterator[Folder]:
        """Hold the folder; write ``eval.json``, or match it and cut back to the last whole chunk.

        A folder that gets no chunk is removed again.

        Raises:
            SlimError: If the folder was started with other settings, or another process writes it.
        """
        with RunDir(self.path, RESULTS).claim(resume=started), disk_errors(self.path):
            try:
                if not started:
                    write_json(self.path / STATE_FILE, asdict(state))
                self.match(state)
                (self.path / PROGRESS_FILE).touch()
                self._rewind()
                yield self
            except BaseException:
                if not started and not any(self.entries.values()):
                    (self.path / STATE_FILE).unlink(missing_ok=True)
                raise

    def match(self, state: EvalState) -> None:
        """Refuse to mix two evaluations.

        Raises:
            SlimError: Names every difference.
        """
        started = read_object(self.path / STATE_FILE)
        if different := fingerprint_difference(started, json.loads(json.dumps(asdict(state))), ""):
            raise SlimError(
                f"{self.path} was started with other settings: {'; '.join(different)}",
                "resume with the same values, or choose another output folder",
            )

    def _rewind(self) -> None:
        """Keep the chunks up to the first that is not whole, and cut the files back to them."""
        progress = self.path / PROGRESS_FILE
        chunks, length = whole_chunks(self.path)
        ends = {samples_name(task): entries[-1].end for task, entries in chunks.items() if entries}
        tasks = read_json(self.path / STATE_FILE)["tasks"]
        samples = [self.path / samples_name(task) for task in tasks]
        for path in [progress, *(path for path in samples if path.exists())]:
            with path.open("r+b") as handle:
                handle.truncate(length if path == progress else ends.get(path.name, 0))
                fsync(handle.fileno())
        self.entries = chunks

    def done(self, task: str) -> int:
        """Return how many chunks of ``task`` are on disk."""
        return len(self.entries.get(task, []))

    def append(self, task: str, data: bytes, **measured: Any) -> Entry:
        """Add the next chunk of ``task``: its samples first, then its line in ``progress.jsonl``.

        Args:
            task: Its name.
            data: Its samples, as ``encode`` gives them.
            measured: The fields of ``Entry`` from ``tokens_computed`` on.

        Raises:
            ResourceError: If the disk is full; what was there before stays whole.
        """
        entries = self.entries.setdefault(task, [])
        end = (entries[-1].end if entries else 0) + len(data)
        entry = Entry(task, len(entries), end, hash_bytes(data), **measured)
        for path, block in (
            (self.path / samples_name(task), data),
            (self.path / PROGRESS_FILE, _line(entry).encode()),
        ):
            with disk_errors(path), path.open("ab") as handle:
                handle.write(block)
                handle.flush()
                fsync(handle.fileno())
        entries.append(entry)
        return entry

    def records(self, task: str) -> list[Record]:
        """Return the records of ``task`` that are on disk, in row order."""
        path = self.path / samples_name(task)
        return read_samples(path) if path.exists() else []

    def finish(self, results: JsonObject, timings: JsonObject) -> None:
        """Write ``timings.json``, then ``results.json``."""
        write_json(self.path / TIMINGS_FILE, timings)
        write_json(self.path / RESULTS_FILE, results)


def whole_chunks(out: Path) -> tuple[dict[str, list[Entry]], int]:
    """Return the chunks of each task up to the first that is not whole.

    Returns:
        Task -> its chunks, each of which has the bytes in the samples file that were hashed when it
        was written; and the bytes of ``progress.jsonl`` that name them.
    """
    chunks: dict[str, list[Entry]] = {}
    length = 0
    for _, line in json_lines(read_bytes(out / PROGRESS_FILE)):
        entry = _entry(line)
        if entry is None:
            break
        entries = chunks.setdefault(entry.task, [])
        begin = entries[-1].end if entries else 0
        part = _part(out / samples_name(entry.task), begin, entry.end)
        if entry.chunk != len(entries) or hash_bytes(part) != entry.sha256:
            break
        entries.append(entry)
        length += len(line)
    return chunks, length


def _line(entry: Entry) -> str:
    return json.dumps(asdict(entry)) + "\n"


def _entry(line: bytes) -> Entry | None:
    """Return the chunk that a line of ``progress.jsonl`` names; None if a kill cut it short."""
    if not line.endswith(b"\n"):
        return None
    try:
        values = parse_json(line, "")
        if not isinstance(values, dict):
            return None
        for key in fields(Entry):
            kind = {"str": str, "int": int, "float": float}[str(key.type)]
            field(values, "", key.name, kind)
        entry = Entry(**values)
    except (SlimError, TypeError):
        return None
    return entry if entry.task == Path(entry.task).name else None


def _part(path: Path, begin: int, end: int) -> bytes:
    """Return bytes ``begin`` to ``end`` of a file; fewer if it is shorter, none if it is absent."""
    if not path.exists():
        return b""
    with path.open("rb") as handle:
        handle.seek(begin)
        return handle.read(max(0, end - begin))


def read_results(out: Path) -> JsonObject:
    """Return the object of ``results.json`` of a complete evaluation.

    Raises:
        SlimError: If ``out`` holds none.
    """
    if not (out / RESULTS_FILE).exists():
        if (out / STATE_FILE).exists():
            raise SlimError(f"{out} is not complete", "finish it first: mlx-slim eval … --resume")
        raise SlimError(f"{out} holds no {RESULTS_FILE}", "give the output folder of mlx-slim eval")
    return read_object(out / RESULTS_FILE)


def load_results(out: Path) -> EvalResults:
    """Return ``results.json`` of a complete evaluation.

    Raises:
        SlimError: If ``out`` holds none, or it is damaged.
    """
    path, results = out / RESULTS_FILE, read_results(out)
    if not isinstance(results.get("tasks"), dict):
        raise SlimError(f"{path} is not a result of mlx-slim eval", "give the folder of one model")
    return EvalResults.read(results, short(path))


def check_sample(record: Record, where: str, scores: Iterable[str]) -> None:
    """Refuse a per-question record that cannot be counted.

    Args:
        record: Of a samples file.
        where: Begins the message: file and line.
        scores: Keys that hold a share of right answers, 0 to 1.

    Raises:
        SlimError: Names the key and its value.
    """
    field(record, where, "doc_id", int)
    field(record, where, "subject", str, None)
    for name in scores:
        field(record, where, name, float, low=0, high=1)
    if "loglikelihoods" in record:
        field(record, where, "loglikelihoods", list, low=1, of=float)
