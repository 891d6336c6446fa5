"""What to look for: the values that ``mlx-slim analyze intruders`` takes.

Invariant: the only home of these defaults; nothing heavy is imported. Try it:
``mlx-slim analyze intruders --help``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Interval

from mlx_slim.config.options import option
from mlx_slim.config.values import PositiveInt


@dataclass(frozen=True)
class IntruderOptions:
    """What is compared with the base, and what counts as an intruder.

    Attributes:
        adapter: Adapter folder, or
        tuned: a whole tuned model: one of both.
        k: Leading directions of each matrix.
        epsilon: Largest cosine of an intruder to the directions of the base.
        repair: Share of each intruder that a repaired adapter keeps; None repairs none.
        no_cache: Do not keep the spectra of the base on disk.
    """

    adapter: Path | None = field(default=None, metadata=option("Adapter folder."))
    tuned: str | None = field(
        default=None, metadata=option("A whole tuned model: folder or hub id.")
    )
    k: PositiveInt = field(
        default=10, metadata=option("Top singular directions of each weight to examine.")
    )
    epsilon: Annotated[float, Interval(gt=0, le=1)] = field(
        default=0.5,
        metadata=option(
            "A direction whose cosine to all of the base's is below this is an intruder."
        ),
    )
    repair: Annotated[float, Interval(ge=0, le=1)] | None = field(
        default=None,
        metadata=option("Write the adapter with this share of each intruder left.", metavar="KEEP"),
    )
    no_cache: bool = field(
        default=False, metadata=option("Do not cache the base's spectra on disk.")
    )
