"""Training speed and memory side by side: ours against a peer, or one method against another.

Invariant: each side runs in a fresh process, the sides alternate, and what is quoted are medians
over the rounds, as ratios. Try it:
``mlx-slim bench train MODEL --data tatsu-lab/alpaca --against mlx-lm --json``.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_slim.bench.options import BenchTrainOptions
from mlx_slim.bench.rounds import record, run_side
from mlx_slim.bench.sides import TrainWork
from mlx_slim.bench.torch_sides import check_installed
from mlx_slim.config.schema import DataConfig
from mlx_slim.data.ledger import SourceLedger
from mlx_slim.data.pipeline import Pipeline
from mlx_slim.data.sources import find
from mlx_slim.errors import SlimError
from mlx_slim.models.load import load_tokenizer
from mlx_slim.reading import JsonObject

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


def _system_message(path: str, tokenizer: TokenizerWrapper, tokens: int) -> str:
    """Return the first ``tokens`` tokens of the text of the rows.

    Raises:
        SlimError: If the rows have fewer.
    """
    ids: list[int] = []
    for row in find(DataConfig(path=path).sources[0]):
        text = " ".join(value for value in row.value.values() if isinstance(value, str))
        ids += tokenizer.encode(text, add_special_tokens=False)
        if len(ids) >= tokens:
            return str(tokenizer.decode(ids[:tokens]))
    raise SlimError(
        f"{path} has {len(ids)} tokens, --system-tokens is {tokens}", "give fewer, or more rows"
    )


def _rows(
    path: str, model: str, count: int, max_length: int, out: Path, system_tokens: int = 0
) -> int:
    """Write the first ``count`` Alpaca rows that fit as chat rows; return their real tokens.

    Raises:
        SlimError: If there are fewer, or too few for a system message of ``system_tokens``.
    """
    tokenizer = load_tokenizer(model)
    system = _system_message(path, tokenizer, system_tokens) if system_tokens else None
    config = DataConfig(path=path, validation=0, system=system)
    pipeline = Pipeline(config, tokenizer, max_length=max_length)
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
    model: str, options: BenchTrainOptions, progress: Callable[[str], None]
) -> JsonObject:
    """Measure our training of a method against a peer's, another method, or itself not compiled.

    Args:
        model: Hub id or folder.
        options: What is trained, on which rows, and how often.
        progress: Called with a line before each run.

    Returns:
        The record that DESIGN.md calls ``bench … --json``; with ``options.profile`` the keys
        ``work`` and ``profile``.

    Raises:
        SlimError: If there are too few rows, PEFT is not installed, or a side fails.
    """
    method, against = options.method, options.against
    other = against.replace("-", "_")
    if against == "peft":
        check_installed("peft")
    eager = against == "eager"
    changed: JsonObject = {"compile": False} if eager else {"method": against}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        system = options.system_tokens
        tokens = _rows(options.data, model, options.rows, options.max_length, file, system)
        work = TrainWork(
            model=model,
            rows=str(file),
            method=method,
            batch=options.batch,
            max_length=options.max_length,
            dtype=options.dtype,
            compile=True if eager else None,
        )
        if options.profile:
            progress("training an epoch, then each component of its steps alone")
            measured = run_side("profile", "ours", asdict(work))
            return {"work": _described(work, options, tokens), "profile": measured}
        results: list[JsonObject] = []
        for number in range(options.rounds):
            progress(f"round {number + 1}/{options.rounds}: {method}")
            ours = run_side("sides", "ours", asdict(work))
            progress(f"  {ours['tokens_per_second']:.1f} tokens/s; against {against}")
            if against in ("mlx-lm", "peft"):
                module = "sides" if against == "mlx-lm" else "torch_sides"
                theirs = run_side(module, against, asdict(work))
            else:
                theirs = run_side("sides", "ours", asdict(replace(work, **changed)))
            progress(f"  {theirs['tokens_per_second']:.1f} tokens/s")
            results.append({"ours": ours, other: theirs})
    described = _described(work, options, tokens)
    return record({**described, "against": against}, other, results)


def _described(work: TrainWork, options: BenchTrainOptions, tokens: int) -> JsonObject:
    """Return the key ``work`` of a record."""
    values = {key: value for key, value in asdict(work).items() if key != "rows"}
    values |= {"data": options.data, "rows": options.rows, "real_tokens": tokens}
    return {**values, "system_tokens": options.system_tokens}
