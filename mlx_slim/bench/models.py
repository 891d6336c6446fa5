"""What works for each model type of the installed mlx-lm: a table, measured.

Invariant: a cell is computed in a child process, which a cell that takes too long or kills it does
not outlive; the child that follows it computes the next cell. The table names the version that
it is of, and ``docs/models.md`` is made of it alone. Try it:
``mlx-slim bench models --type qwen3 --type gemma3``.
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import IO

from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.models.normalize import architectures
from mlx_slim.reading import JsonObject, read_object

# In the order of the table; ``model_cells.COLUMNS`` has the check of each.
COLUMNS = (
    "load",
    "LoRA",
    "QLoRA",
    "full",
    "packed",
    "split head",
    "eval",
    "shared prefixes",
    "quantize",
    "prune depth",
    "prune width",
    "fuse",
    "GGUF out",
    "GGUF in",
)
OK = "ok"
NOT_SMALL = "does not build small"
SECONDS = 60.0  # of a cell
_START = 120.0  # of the first cell of a process, which imports everything
_MODULE = "mlx_slim.bench.model_cells"

Job = tuple[str, list[str]]  # model type and the columns to compute
Table = dict[str, dict[str, str]]  # model type -> column -> cell


@dataclass(frozen=True)
class ModelTable:
    """What works, and of which versions.

    Attributes:
        mlx_lm: Version.
        mlx: Version.
        columns: Of ``COLUMNS``.
        models: Model type -> column -> cell.
    """

    mlx_lm: str
    mlx: str
    columns: list[str]
    models: Table

    def as_json(self) -> JsonObject:
        """Return what ``bench models --json`` prints."""
        return {"schema_version": 1, **asdict(self)}


def read_table(path: Path) -> ModelTable:
    """Return a table that ``bench models -o`` wrote.

    Raises:
        SlimError: If it is none.
    """
    values = read_object(path, mlx_lm=str, mlx=str, columns=list, models=dict)
    return ModelTable(*(values[one.name] for one in fields(ModelTable)))


def bench_models(
    types: Sequence[str] = (),
    columns: Sequence[str] = (),
    progress: Callable[[str], None] = lambda line: None,
    seconds: float = SECONDS,
) -> ModelTable:
    """Compute a table.

    Args:
        types: Model types; none means all of the installed mlx-lm.
        columns: Of ``COLUMNS``; none means all.
        progress: Called with a line after each model type.
        seconds: Longest time of a cell.

    Raises:
        SlimError: If a type or a column is unknown.
    """
    installed = architectures()
    for words, choices, what in ((types, installed, "model type"), (columns, COLUMNS, "column")):
        for word in words:
            if word not in choices:
                raise SlimError(f"unknown {what} {word!r}", did_you_mean(word, choices))
    chosen = [column for column in COLUMNS if column in (columns or COLUMNS)]
    jobs = [(model_type, list(chosen)) for model_type in types or installed]
    versions = metadata.version("mlx-lm"), metadata.version("mlx")
    return ModelTable(*versions, chosen, compute(jobs, progress, seconds))


def compute(
    jobs: Sequence[Job],
    progress: Callable[[str], None] = lambda line: None,
    seconds: float = SECONDS,
) -> Table:
    """Return the cells of ``jobs``, computed in child processes one after the other."""
    table: Table = {model_type: {} for model_type, _ in jobs}
    waiting = [(model_type, list(columns)) for model_type, columns in jobs if columns]
    while waiting:
        for model_type, column, cell in _child(waiting, seconds):
            table[model_type][column] = cell
            left = waiting[0][1]
            left.remove(column)
            if not left:
                del waiting[0]
                progress(_line(model_type, table[model_type]))
    return table


def _line(model_type: str, row: dict[str, str]) -> str:
    wrong = [f"{column}: {cell}" for column, cell in row.items() if cell != OK]
    return f"{model_type:22} {len(row) - len(wrong):2} ok" + "".join(f"\n  {w}" for w in wrong)


def _child(jobs: Sequence[Job], seconds: float) -> Iterator[tuple[str, str, str]]:
    """Yield the cells of one process until it is done, dies or is too slow.

    Of one that dies or is too slow, the cell that it worked on says so.
    """
    expected = iter([(name, column) for name, columns in jobs for column in columns])
    process = subprocess.Popen(
        [sys.executable, "-m", _MODULE, json.dumps(jobs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    limit = max(seconds, _START)
    try:
        for name, column in expected:
            try:
                line = lines.get(timeout=limit)
            except queue.Empty:
                yield name, column, f"takes more than {seconds:g} s"
                return
            if not line:
                yield name, column, f"the process dies: {_ending(process.wait())}"
                return
            name, column, cell = json.loads(line)
            yield name, column, cell
            limit = seconds
    finally:
        process.kill()
        process.wait()


def _read(stream: IO[str], lines: queue.Queue[str]) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
