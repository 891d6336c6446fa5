"""What candidates are made of, and where they find what several of them use.

Invariant: a path here is of the machine that makes the candidate. Used by ``slimming/build.py``.
Try it: ``mlx-slim slim MODEL -o DIR --disk 200MB --task arc_easy``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlx_slim.slimming.candidate import Candidate


@dataclass(frozen=True)
class Material:
    """What candidates are made of.

    Attributes:
        source: The original.
        revision: Of a hub model.
        data: Rows to recover on and to calibrate with; None is the Alpaca mirror.
        folder: Of the search, with importance scores.
        targets: Folder of the teacher's targets: one process at a time writes there.
    """

    source: str
    revision: str | None
    data: str | None
    folder: Path
    targets: Path

    def scores_at(self, candidate: Candidate, index: int) -> Path | None:
        """Return the file of the scores of a cut; only those of the original are shared."""
        axis = candidate.cuts[index].axis
        return self.folder / f"importance-{axis}.safetensors" if index == 0 else None
