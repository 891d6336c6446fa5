"""``metrics.jsonl``: one event a line, in order, also after a kill and a resume.

Invariant: the file never holds two lines for one step; resuming from step N drops what came after
N, because those steps are about to be taken again.
"""

from __future__ import annotations

import json
from pathlib import Path

from mlx_slim.artifacts import disk_errors, fsync, json_lines, write_text
from mlx_slim.events import Event, Saved


class MetricsFile:
    """An observer that appends every event's record to a file, flushed at once.

    Once a checkpoint is on the storage medium, so are the lines before it: a resume from it after a
    power cut misses none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Drop the lines of steps after ``step``, and a line that a kill cut short."""
        if not self.path.exists():
            return
        kept = []
        for _, line in json_lines(self.path):
            try:
                record = json.loads(line)
            except ValueError:
                break
            if record.get("step", step) > step:
                break
            if record.get("event") not in ("started", "done"):
                kept.append(line.decode().rstrip("\n"))
        write_text(self.path, "".join(line + "\n" for line in kept))

    def notify(self, event: Event) -> None:
        """Append one line."""
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(event.as_record()) + "\n")
            if isinstance(event, Saved):
                handle.flush()
                fsync(handle.fileno())
