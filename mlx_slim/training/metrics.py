"""``metrics.jsonl``: one event a line, in order, also after a kill and a resume.

Invariant: the file never holds two lines for one step; resuming from step N drops what came after
N, because those steps are about to be taken again. So a run that was killed and resumed ends with
the lines of one that was not, but for times and one more line, ``resumed``.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from mlx_slim.artifacts import disk_errors, fsync, json_lines, write_text
from mlx_slim.errors import SlimError
from mlx_slim.events import Done, Event, Saved, Started
from mlx_slim.reading import field, parse_json


class MetricsFile:
    """An observer that appends every event's record to a file, flushed at once.

    Once a checkpoint is on the storage medium, so are the lines before it: a resume from it after a
    power cut misses none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._resuming = False
        self._total: int | None = None

    def clear(self) -> None:
        """Drop everything: the run begins with its first step."""
        self._resuming = False
        self.path.unlink(missing_ok=True)

    def rewind(self, saved: Saved, without: Collection[str] = ()) -> None:
        """Cut the file back to a checkpoint; its own line is added if a kill came before it.

        The line of the start is there already and is not written twice, unless the run is to
        take more steps now.

        Args:
            saved: The checkpoint.
            without: Events of its step that go too.
        """
        self._resuming = True
        saved_line = json.dumps(saved.as_record())
        lines: list[str] = []
        end = 0  # lines after it belong to no step: they are written again
        for _, raw in json_lines(self.path) if self.path.exists() else ():
            line = raw.decode(errors="replace").rstrip("\n")
            try:
                record = parse_json(line, "", halves=True)
                step = field(record, "", "step", int, 0) if isinstance(record, dict) else None
            except SlimError:
                break
            if step is None:
                break
            past = step > saved.step or record.get("event") == Done.name
            if past or line == saved_line:
                break
            if record.get("step") == saved.step and record.get("event") in without:
                continue
            lines.append(line)
            if record.get("event") == Started.name:
                self._total = record.get("total_steps")
                end = len(lines)
            elif "step" in record:
                end = len(lines)
        write_text(self.path, "".join(line + "\n" for line in [*lines[:end], saved_line]))

    def notify(self, event: Event) -> None:
        """Append one line."""
        if self._resuming and isinstance(event, Started):
            self._resuming = False
            if event.total_steps == self._total:
                return
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(event.as_record()) + "\n")
            if isinstance(event, Saved):
                handle.flush()
                fsync(handle.fileno())
