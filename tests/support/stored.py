"""What commands stored: files without what a clock says, and waiting for them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CLOCKS = ("seconds", "per_second", "time", "started", "finished", "memory_bytes", "load")


def files_of(folder: Path, *names: str) -> dict[str, Any]:
    """Return the JSON files and the tensors of files and folders in ``folder``, without times."""
    stored: dict[str, Any] = {}
    paths = [folder / name for name in names]
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    for file in sorted(files):
        if not file.is_file() or "checkpoints" in file.parts:
            continue
        name = file.relative_to(folder).as_posix()
        if file.suffix == ".json":
            stored[name] = timeless(json.loads(file.read_text()))
        elif file.suffix == ".jsonl":
            stored[name] = [timeless(json.loads(line)) for line in file.read_text().splitlines()]
        elif file.suffix == ".safetensors":
            stored[name] = file.read_bytes()
    return stored


def timeless(value: Any) -> Any:
    """Return a JSON value without the keys that name a time or a memory counter."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not any(c in k for c in _CLOCKS)}
    return [timeless(one) for one in value] if isinstance(value, list) else value


def until(ready: Callable[[], Any], seconds: float = 500) -> Any:
    """Wait for a value that is true, and return it."""
    end = time.monotonic() + seconds
    while not (value := ready()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return value
