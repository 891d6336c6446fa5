"""Whether a machine computes right: the self-test of ``mlx-slim doctor``.

Invariant: it needs no download and no data, leaves nothing behind, and a check that fails or cannot
run is ``off``, never left out; its record holds no path and no name of user or host, so that it can
be published. Try it: ``mlx-slim doctor --self-test``.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_slim.artifacts import SCHEMA_VERSION
from mlx_slim.bench.machine import machine
from mlx_slim.bench.self_checks import CHECKS, Deviation, Place
from mlx_slim.bench.small_model import write_rows, write_small_model
from mlx_slim.errors import SlimError
from mlx_slim.progress import stage
from mlx_slim.reading import JsonObject
from mlx_slim.runtime import on_gpu

OK, OFF, SKIPPED, REPORTED = "ok", "off", "skipped", ""
ROWS = 12


@dataclass(frozen=True)
class CheckResult:
    """A line of the table.

    Attributes:
        check: What is compared, or measured.
        measured: The largest difference, or the figure; None where nothing could be measured.
        allowed: The largest difference that is right; None where a figure is only reported.
        unit: Of both; empty for a ratio.
        status: ``ok``, ``off``, ``skipped`` or empty.
        note: Where the difference is largest, why it is skipped, or the kind of error.
    """

    check: str
    measured: float | None
    allowed: float | None
    unit: str
    status: str
    note: str = ""


def self_test(report: Callable[[str], None]) -> JsonObject:
    """Run every check on the default device; return the record of ``doctor --self-test --json``.

    Args:
        report: Called with the message of a check that could not run, which may name paths.

    Returns:
        ``machine``, ``checks``, ``seconds`` and ``ok``.
    """
    began = time.perf_counter()
    results: list[CheckResult] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_small_model(folder / "model")
        rows = write_rows(folder / "rows.jsonl", ROWS)
        for title, check in CHECKS.items():
            work = folder / title.replace(" ", "-")
            work.mkdir()
            with stage(f"checking {title}"):
                results += _run(title, check, Place(model, rows, work), report)
            mx.clear_cache()
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": machine(),
        "checks": [asdict(result) for result in results],
        "seconds": round(time.perf_counter() - began, 1),
        "ok": all(result.status != OFF for result in results),
    }


def _run(
    title: str,
    check: Callable[[Place], Any],
    place: Place,
    report: Callable[[str], None],
) -> list[CheckResult]:
    """Return the lines of one check; an error is a line too."""
    if title == "compiled step" and not on_gpu() and shutil.which("g++") is None:
        return [CheckResult(title, None, None, "", SKIPPED, "no g++")]
    results: list[CheckResult] = []
    try:
        results += (_judged(one) for one in check(place))
    except Exception as error:  # whatever it is, it is a result of this machine
        text = error.message if isinstance(error, SlimError) else str(error)
        report(f"{title}: {type(error).__name__}: {' '.join(text.split())}")
        results.append(CheckResult(title, None, None, "", OFF, type(error).__name__))
    return results


def _judged(deviation: Deviation) -> CheckResult:
    """Return the line of a difference; NaN is off."""
    what, value, allowed, unit, where = deviation
    if math.isnan(value):
        return CheckResult(what, None, allowed, unit, OFF, "NaN")
    status = REPORTED if allowed is None else OK if value <= allowed else OFF
    return CheckResult(what, float(f"{value:.4g}"), allowed, unit, status, where)
