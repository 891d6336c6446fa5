"""Training speed and memory side by side: ours against mlx-lm, or one method against another.

Invariant: each side runs in a fresh process, the sides alternate, and what is quoted are medians
over the rounds, as ratios. Try it:
``mlx-slim bench train MODEL --data tatsu-lab/alpaca --against mlx-lm --json``.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_slim.bench.rounds import record, run_side
from mlx_slim.config.schema import DataConfig
from mlx_slim.data.ledger import SourceLedger
from mlx_slim.data.pipeline import Pipeline
from mlx_slim.data.sources import find
from mlx_slim.errors import SlimError
from mlx_slim.models.load import load_tokenizer

METHODS = ("lora", "qlora", "dora", "full")


def _rows(path: str, model: str, count: int, max_length: int, out: Path) -> int:
    """Write the first ``count`` Alpaca rows that fit as chat rows; return their real tokens."""
    config = DataConfig(path=path, validation=0)
    pipeline = Pipeline(config, load_tokenizer(model), max_length=max_length)
    source_config = config.sources[0]
    source = find(source_config)
    ledger = SourceLedger(source.name, source.kind, 1.0, source.ignored)
    tokens, lines = 0, []
    for row in pipeline.rows(source, source_config, ledger):
        lines.append(json.dumps({"messages": row.example.messages}))
        tokens += row.length
        if len(lines) == count:
            break
    if len(lines) < count:
        raise SlimError(f"{path} has {len(lines)} usable rows, the benchmark needs {count}")
    out.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return tokens


def bench_train(
    model: str,
    *,
    data: str,
    method: str,
    against: str,
    rows: int,
    batch: int,
    max_length: int,
    dtype: str,
    rounds: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Measure our training of ``method`` against mlx-lm's, or against another method of ours.

    Args:
        model: Hub id or folder.
        data: Alpaca rows: hub id, mirror or file.
        method: ``lora``, ``qlora``, ``dora`` or ``full``.
        against: ``mlx-lm``, or another method.
        rows: Rows of the epoch (the first step is not timed).
        batch: mlx-lm's rows per step; ours gets the token budget ``batch`` · ``max_length``.
        max_length: Longest row, tokens.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        rounds: Times each side runs, alternating.
        progress: Called with a line before each run.

    Returns:
        The record that DESIGN.md calls ``bench … --json``.
    """
    other = "mlx_lm" if against == "mlx-lm" else against
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        tokens = _rows(data, model, rows, max_length, file)
        work = {
            "model": model,
            "rows": str(file),
            "method": method,
            "batch": batch,
            "max_length": max_length,
            "dtype": dtype,
        }
        results: list[dict[str, Any]] = []
        for number in range(rounds):
            progress(f"round {number + 1}/{rounds}: {method}")
            ours = run_side("sides", "ours", work)
            progress(f"  {ours['tokens_per_second']:.1f} tokens/s; against {against}")
            if against == "mlx-lm":
                theirs = run_side("sides", "mlx-lm", work)
            else:
                theirs = run_side("sides", "ours", {**work, "method": against})
            progress(f"  {theirs['tokens_per_second']:.1f} tokens/s")
            results.append({"ours": ours, other: theirs})
    described = {key: value for key, value in work.items() if key != "rows"}
    described |= {"data": data, "rows": rows, "real_tokens": tokens, "against": against}
    return record(described, other, results)
