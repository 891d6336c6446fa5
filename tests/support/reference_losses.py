"""Losses of tiny fixed runs, committed, so that a change of numerics is a visible diff.

``make reference-losses`` computes them again and writes ``tests/reference_losses.json``; commit the
difference with the change that explains it. ``tests/test_reference_losses.py`` compares: to the
digit on a machine like the one recorded in the file, to 1e-5 elsewhere. To print them:
``OPENBLAS_NUM_THREADS=1 python -m tests.support.reference_losses --print``.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx_slim  # noqa: F401  # first: the fast BLAS
from mlx_slim.cli.main import run as command
from tests.support.runs import write_rows
from tests.support.tiny import tiny_model

FILE = Path(__file__).parents[1] / "reference_losses.json"
DISTILL = {"teachers": [{"model": "teacher"}], "weight": 0.5, "top_k": 16}
RUNS: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "train": {"learning_rate": 1e-3}},
    "lora": {"method": "lora"},
    "qlora": {"method": "qlora"},
    "dora": {"method": "dora"},
    "distillation": {"method": "lora", "distill": DISTILL},
    "pruning and recovery": {"method": "lora"},
}


def machine() -> dict[str, Any]:
    """Return what the digits depend on: versions, the BLAS, its kernel and its threads."""
    return {
        "mlx": version("mlx"),
        "platform": f"{platform.system()} {platform.machine()}",
        "blas": _blas("openblas_get_config", ctypes.c_char_p),
        "kernel": _blas("openblas_get_corename", ctypes.c_char_p),
        "threads": _blas("openblas_get_num_threads", ctypes.c_int),
    }


def _blas(function: str, kind: Any) -> Any:
    """Return what the BLAS in this process says of itself; None where it is no OpenBLAS."""
    try:
        call = getattr(ctypes.CDLL(None), function)
    except AttributeError:
        return None
    call.restype = kind
    value = call()
    return value.decode() if isinstance(value, bytes) else value


def compute(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Run all of ``RUNS`` in ``folder``; return the losses of their steps and validations."""
    tiny_model(folder / "model")
    tiny_model(folder / "teacher", seed=1)
    write_rows(folder / "rows.jsonl")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 12)
    with contextlib.chdir(folder):
        return {name: _losses(name, values) for name, values in RUNS.items()}


def _losses(name: str, values: dict[str, Any]) -> dict[str, list[float]]:
    recipe, run = Path("recipe.yaml"), Path(name.replace(" ", "-"))
    train = {
        "steps": 8,
        "batch_tokens": 256,
        "max_length": 128,
        "validate_every": 4,
        "learning_rate": 1e-2,
        "dtype": "float32",
        **values.get("train", {}),
    }
    settings = {
        "model": "model",
        "adapter": {"rank": 4, "dropout": 0.1},
        "quantize": {"group_size": 32},
        "data": {"path": "rows.jsonl", "validation": 4},
        **values,
        "train": train,
    }
    recipe.write_text(json.dumps(settings))
    words = ["distill" if "distill" in values else "train", str(recipe)]
    if name.startswith("pruning"):
        words = ["prune", "model", "--ratio", "0.5", "--calibration", "text.txt"]
        words += ["--samples", "4", "--length", "32", "--recover", str(recipe)]
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        code = command([*words, "-o", str(run)])
    if code:
        raise SystemExit(f"{name}: {err.getvalue()}")
    (metrics,) = run.rglob("metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {
        event: [line["loss"] for line in lines if line["event"] == event]
        for event in ("step", "validation")
    }


def main() -> None:
    """Compute the losses; write the file, or print it with ``--print``."""
    with tempfile.TemporaryDirectory() as folder:
        record = {"machine": machine(), "losses": compute(Path(folder))}
    text = json.dumps(record, indent=1) + "\n"
    if "--print" in sys.argv:
        print(text)
        return
    FILE.write_text(text)
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
