"""How a mix of few bits is made: its blocks learn what the original's return, on so many rows.

Invariant: the number of rows is chosen from shapes and the machine's speed, before anything is
trained, by the process that searches; it is in ``rows.json`` of the candidate, so that what is made
does not depend on where, or after how many kills. Try it:
``mlx-slim quantize MODEL -o DIR --bits-per-weight 3.5 --method blockwise``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from mlx_slim.artifacts import write_json
from mlx_slim.errors import SlimError
from mlx_slim.models.hub import resolve
from mlx_slim.models.opening import open_weights
from mlx_slim.models.verified_save import compute_dtype
from mlx_slim.planner.time import estimate, this_machine
from mlx_slim.planner.work import Operations
from mlx_slim.quantization.block_rows import Training
from mlx_slim.quantization.blockwise import check_blocks
from mlx_slim.quantization.policy import make_policy
from mlx_slim.reading import read_object
from mlx_slim.slimming.candidate import Candidate
from mlx_slim.slimming.material import Material
from mlx_slim.slimming.recovery import FEWEST_BITS

ROWS_FILE = "rows.json"  # in the folder of a candidate
LENGTH = 256  # tokens of a row
_ROWS, _LEAST, _MOST = 64, 8, 512  # without a limit of time; with one


def trains_blocks(candidate: Candidate) -> bool:
    """Return whether the blocks of a candidate are trained: not cut, layers in few bits each."""
    bits = candidate.bits_per_weight
    return not candidate.cuts and bits is not None and bits < FEWEST_BITS


def passes(training: Training) -> int:
    """Return the forward passes that a token takes, a backward pass counted as two.

    The float block and the one before it in bits; each epoch of a block forward and backward; each
    of the second phase forward, and forward again and backward a block at a time.
    """
    return 2 + 3 * training.epochs + 4 * training.end_epochs


def rows_within(parameters: int, seconds: float | None) -> int:
    """Return the calibration rows that blocks can be trained on.

    Args:
        parameters: Of the dense model.
        seconds: Of the whole; None is no limit.
    """
    if seconds is None:
        return _ROWS
    training = Training()
    flops = 2.0 * parameters * passes(training) * LENGTH
    work = Operations(flops, 0.0, 0.0, 0.0, 0.0, LENGTH * training.batch)
    each = estimate(work, this_machine(compute_dtype() or mx.bfloat16)).high
    return max(_LEAST, min(_MOST, int(seconds / each)))


def write_rows(
    material: Material, candidate: Candidate, folder: Path, limits: Sequence[float]
) -> str:
    """Write how many rows a candidate's blocks are trained on: none where they cannot be.

    Args:
        material: What it is made of.
        candidate: One whose blocks are trained.
        folder: Of it.
        limits: Seconds, as for ``recovery.write_recipe``: the first is taken.

    Returns:
        Why they cannot be trained; empty where they are.
    """
    quantize, why = candidate.quantize, ""
    assert quantize is not None
    rows = rows_within(candidate.cost.parameters, limits[0] if limits else None)
    model = open_weights(resolve(material.source, material.revision))[0]
    try:
        check_blocks(model, make_policy(model, quantize))
    except SlimError as error:
        rows, why = 0, error.message
    write_json(folder / ROWS_FILE, {"rows": rows})
    return why


def rows_of(folder: Path) -> int:
    """Return the rows that a candidate's blocks are trained on; 0 where it is rounded.

    Raises:
        SlimError: If the file is damaged.
    """
    file = folder / ROWS_FILE
    return read_object(file, rows=int)["rows"] if file.exists() else 0  # older searches round
