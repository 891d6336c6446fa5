"""The files of a sweep, and how its folder is told from others without importing what searches.

Invariant: imports nothing of the package. Try it: ``mlx-slim report DIR``.
"""

from __future__ import annotations

from pathlib import Path

STATE_FILE, STUDY_FILE, REPORT_FILE = "request.json", "study.db", "sweep.json"
TRIALS, SEEDS, WINNER = "trials", "seeds", "winner.yaml"
# In the folder of a trial.
RECIPE, REQUEST, OUTCOME, RUN = "recipe.yaml", "trial.json", "outcome.json", "run"


def is_sweep(folder: Path) -> bool:
    """Return whether ``folder`` holds a sweep."""
    return (folder / STATE_FILE).is_file() and (folder / STUDY_FILE).is_file()
