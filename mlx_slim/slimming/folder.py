"""How the folder of a finished search is told from others, without importing what searches.

Invariant: imports nothing of the package. Try it: ``mlx-slim report DIR``.
"""

from __future__ import annotations

from pathlib import Path

REPORT_FILE = "slim.json"
CANDIDATES, SCORES = "candidates", "scores"
# In the folder of a search and in that of a candidate: the weights, and what a teacher gives.
MODEL, TARGETS = "model", "targets"


def is_search(folder: Path) -> bool:
    """Return whether ``folder`` is that of a finished search."""
    return (folder / REPORT_FILE).is_file()
