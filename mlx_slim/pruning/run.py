"""A dense model in, fewer layers or narrower ones out: plan, measure, cut, judge, save, compare.

Invariant: the output folder appears only when what it holds computes exactly what was measured, in
the dtype that the source is stored in; ``prune.json`` beside the weights says what went and why,
``prune_scores.safetensors`` every score. Try it: ``mlx-slim prune MODEL -o DIR --ratio 0.2``.

Shapes: N rows, T tokens a row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_slim.artifacts import (
    SCHEMA_VERSION,
    atomic_file,
    load_tensors,
    provenance,
    public_name,
    save_tensors,
    write_json,
)
from mlx_slim.claims import makes_folder
from mlx_slim.errors import RowLimit, SlimError
from mlx_slim.events import Notice, Observer
from mlx_slim.models import fidelity, structure
from mlx_slim.models.build import WIDTHS
from mlx_slim.models.limits import limit_of
from mlx_slim.models.load import Loaded, cast, load, read_config, read_weights, resolve
from mlx_slim.models.recorded import RecordedLogits, release
from mlx_slim.models.structure import HEADS
from mlx_slim.models.tensors import folder_tensors
from mlx_slim.models.verified_save import compute_dtype, save_checked, stored_dtype
from mlx_slim.pruning import importance, surgery, width
from mlx_slim.pruning.depth import choose_layers
from mlx_slim.pruning.options import NAMED, PruneOptions
from mlx_slim.pruning.plan import Plan, plan, weight_size
from mlx_slim.quantization.apply import refuse_quantized
from mlx_slim.quantization.calibration import DEFAULT_SOURCE, read_calibration
from mlx_slim.runtime import human_bytes, human_duration, memory_budget, on_gpu

__all__ = ["PruneOptions", "Pruned", "held_out_rows", "prune"]

RECORD_FILE, SCORES_FILE = "prune.json", "prune_scores.safetensors"
JUDGED_LENGTH = 256  # tokens of a row that the result is judged on
_LAYERS, _STARTS, _STEPS, _LOSSES = "layers.removed", "layers.score", "steps.layer", "steps.loss"

Scores = dict[str, np.ndarray]


@dataclass(frozen=True)
class Pruned:
    """What came out.

    Attributes:
        path: The folder.
        record: ``prune.json``.
    """

    path: Path
    record: dict[str, Any]

    def lines(self) -> list[str]:
        """Return what a person reads, one fact a line."""
        record = self.record
        lines = [f"{self.path}: {record['axis']} pruned, {record['method']}"]
        lines += _layer_lines(record)
        before, after = record["parameters_before"], record["parameters_after"]
        lines.append(f"parameters {before:,} -> {after:,} ({1 - after / before:.1%} fewer)")
        lines.append(
            f"size       {human_bytes(record['bytes_before'])} -> "
            f"{human_bytes(record['bytes_after'])}"
        )
        if found := record["fidelity"]:
            lines.append(
                f"held out   perplexity {found['perplexity_before']:.2f} -> "
                f"{found['perplexity_after']:.2f}, KL {found['kl']:.4f} nats, same top-1 token "
                f"{found['top1']:.1%} ({found['tokens']:,} tokens)"
            )
        lines += [f"note       {note}" for note in record["notes"]]
        lines.append(
            f"took       {human_duration(record['seconds'])}, peak memory "
            f"{human_bytes(record['peak_memory_bytes'])}"
        )
        return lines


def _layer_lines(record: dict[str, Any]) -> list[str]:
    lines = []
    for entry in record["layers"]:
        number = entry["layer"]
        if "removed" in entry:
            score = entry.get("score")
            why = "" if score is None else f"  {record['score']} {score:.4g}"
            if entry["removed"] or score is not None:
                mark = "removed" if entry["removed"] else "stays"
                lines.append(f"layer {number:>3}  {mark:<8}{why}")
            continue
        parts = []
        for kind, what in entry.items():
            if kind == "layer" or what["before"] == what["after"]:
                continue
            name = "kv heads" if kind == HEADS else "neurons"
            parts.append(
                f"{what['before']:,} -> {what['after']:,} {name} "
                f"({what['importance_removed']:.1%} of importance)"
            )
        lines.append(f"layer {number:>3}  {', '.join(parts) or 'stays'}")
    return lines


@makes_folder("prune", "scores_at")
def prune(
    source: str | Path,
    out: Path,
    options: PruneOptions,
    observer: Observer | None = None,
    *,
    scores_at: Path | None = None,
) -> Pruned:
    """Prune ``source`` into the new folder ``out``.

    Args:
        source: MLX or Hugging Face folder, or hub id, of a dense model.
        out: Must not exist.
        options: See ``PruneOptions``.
        observer: Hears a ``Notice`` for each stage.
        scores_at: File that keeps the scores as soon as they are measured; where it exists, they
            are read from it instead.

    Raises:
        ResourceError: If memory or disk do not suffice.
        SlimError: If anything given cannot be used, or the saved model is not the measured one.
    """

    def say(message: str, level: str = "info") -> None:
        if observer is not None:
            observer.notify(Notice(message, level))

    start = time.perf_counter()
    config = read_config(source, options.revision)
    plan(config, options, weight_size(config))  # refuse what cannot work before the weights
    tensors = folder_tensors(resolve(source, options.revision))
    stored = stored_dtype(tensors)
    found = plan(config, options, stored.size)
    mx.reset_peak_memory()
    say(f"loading {source}")
    loaded = load(source, revision=options.revision, dtype=compute_dtype())
    refuse_quantized(loaded.model, loaded.config)
    loaded.model.eval()
    seen_NT, judged_NT = _text(loaded, options, found, say)
    if scores_at is not None and scores_at.exists():
        say(f"scores read from {scores_at}")
        scores = {name: np.array(value) for name, value in load_tensors(scores_at).items()}
    else:
        scores = _measure(loaded, options, found, seen_NT, say)
        if scores_at is not None:
            _keep(scores_at, scores)
    original = None if judged_NT is None else RecordedLogits(loaded.model, judged_NT, out)
    small, new_config, layers = _cut(loaded, options, found, scores)
    if not on_gpu():  # what is measured below is what will be stored
        for dtype in (stored, mx.float32):
            cast(small, dtype)
            read_weights(small)
    measured = None
    if judged_NT is not None and original is not None:
        say(f"comparing with the source on {judged_NT.size:,} held-out tokens")
        measured = fidelity.compare(original, small, judged_NT)
    record = {
        "schema_version": SCHEMA_VERSION,
        "source": public_name(source),  # the folder may be given to others
        "revision": loaded.revision,
        "axis": found.axis,
        "method": found.method,
        "options": {**asdict(options), "calibration": _named(options.calibration)},
        "calibration": _calibration_record(options, found),
        "score": _meaning(found),
        "layers": layers,
        "parameters_before": found.before.total,
        "parameters_after": sum(v.size for v in _arrays(small)),
        "bytes_before": sum(tensor.nbytes for tensor in tensors.values()),
        "bytes_after": sum(v.size for v in _arrays(small)) * stored.size,
        "stock_mlx_lm_reads_it": WIDTHS not in new_config,
        "fidelity": _fidelity_record(measured),
        "notes": found.notes,
        "provenance": provenance(),
    }
    say(f"saving {out} and reading it back")
    after = Loaded(small, loaded.tokenizer, new_config, loaded.path, loaded.source, loaded.revision)
    del loaded

    def beside(folder: Path) -> None:
        record["seconds"] = time.perf_counter() - start
        record["peak_memory_bytes"] = mx.get_peak_memory()
        save_tensors(folder / SCORES_FILE, {k: mx.array(v) for k, v in scores.items()})
        write_json(folder / RECORD_FILE, record)

    save_checked(out, after, new_config, stored, beside)
    return Pruned(out, record)


def _arrays(model: Any) -> list[mx.array]:
    from mlx.utils import tree_flatten

    return [value for _, value in tree_flatten(model.parameters())]  # pyright: ignore


def _keep(path: Path, scores: Scores) -> None:
    with atomic_file(path) as temporary:
        save_tensors(temporary, {name: mx.array(value) for name, value in scores.items()})


# ----------------------------------------------------------------------------------------- text


def _text(
    loaded: Loaded, options: PruneOptions, found: Plan, say: Callable[..., None]
) -> tuple[mx.array | None, mx.array | None]:
    """Return the rows that the method looks at (N, T), and others that the result is judged on.

    A method that looks at none is judged if there is text.
    """
    samples, length = found.rows
    limit = limit_of(loaded.config)
    width = length or _judged_length(limit)
    try:
        text = read_calibration(
            options.calibration or DEFAULT_SOURCE,
            loaded.tokenizer,
            length=width,
            seen=samples,
            held_out=max(1, -(-options.held_out // width)),
            limit=limit,
        )
    except SlimError as error:
        if options.calibration is None and not samples:
            say(f"the result is not judged: {error.message}; give --calibration FILE", "warning")
            return None, None
        raise
    if samples and len(text.seen_NT) < samples:
        say(f"the text gives {len(text.seen_NT)} of {samples} calibration rows", "warning")
    return (text.seen_NT if samples else None), held_out_rows(text.held_out_NT.reshape(-1), limit)


def _judged_length(limit: RowLimit | None) -> int:
    return min(JUDGED_LENGTH, limit.tokens) if limit else JUDGED_LENGTH


def held_out_rows(ids: mx.array, limit: RowLimit | None) -> mx.array:
    """Return a stream of token ids as rows (N, T) of up to ``JUDGED_LENGTH`` tokens.

    Args:
        ids: The stream.
        limit: The longest row that the model computes right; T is no longer.
    """
    length = min(_judged_length(limit), ids.size)
    rows = ids.size // length
    return ids[: rows * length].reshape(rows, length)


def _calibration_record(options: PruneOptions, found: Plan) -> dict[str, Any] | None:
    samples, length = found.rows
    if not samples:
        return None
    source = _named(options.calibration or DEFAULT_SOURCE)
    return {"source": source, "samples": samples, "length": length}


def _named(text: str | None) -> str | None:
    return None if text is None else public_name(text)


def _fidelity_record(measured: fidelity.Fidelity | None) -> dict[str, Any] | None:
    if measured is None:
        return None
    return {
        **asdict(measured),
        "perplexity_before": math.exp(min(measured.nll_source, 700.0)),
        "perplexity_after": math.exp(min(measured.nll_model, 700.0)),
    }


# ------------------------------------------------------------------------------------- measuring


def _measure(
    loaded: Loaded,
    options: PruneOptions,
    found: Plan,
    seen_NT: mx.array | None,
    say: Callable[..., None],
) -> Scores:
    """Return every score; of a depth method also what it decided."""
    if found.method == NAMED:
        return {_LAYERS: np.array(found.removed, np.int32)}
    rows = "" if seen_NT is None else f" on {len(seen_NT)} rows of {seen_NT.shape[1]} tokens"
    say(f"measuring {found.method}{rows}")
    if found.axis == "width":
        budget = memory_budget("auto") - mx.get_active_memory()
        return importance.group_importance(
            loaded.model, found.method, found.kinds, seen_NT, seed=options.seed, budget=budget
        )
    removal = choose_layers(
        loaded.model,
        found.method,
        found.count,
        found.layers,
        seen_NT,
        seed=options.seed,
        special=set(getattr(loaded.tokenizer, "all_special_ids", []) or []),
    )
    total = len(structure.blocks(loaded.model))
    scores = np.array([removal.scores.get(i, math.nan) for i in range(total)], np.float32)
    kept: Scores = {_LAYERS: np.array(removal.layers, np.int32), _STARTS: scores}
    if removal.steps:
        kept[_STEPS] = np.array([layer for layer, _ in removal.steps], np.int32)
        kept[_LOSSES] = np.array([loss for _, loss in removal.steps], np.float32)
    return kept


def _meaning(found: Plan) -> str:
    """Return what the scores of ``found`` are."""
    return {
        "block-influence": "block influence",
        "angular": f"angle/π over {found.count} layers from here",
        "perplexity": "nats a token without it",
    }.get(found.method, found.method)


# --------------------------------------------------------------------------------------- cutting


def _cut(
    loaded: Loaded, options: PruneOptions, found: Plan, scores: Scores
) -> tuple[Any, dict[str, Any], list[dict[str, Any]]]:
    """Return the pruned model, its config, and what happened to each layer.

    The weights of ``loaded`` are given up: what was cut off is freed.
    """
    if found.axis == "depth":
        removed = [int(i) for i in scores[_LAYERS]]
        model, config = surgery.without_layers(loaded.model, loaded.config, removed)
        release(loaded.model)
        return model, config, _removed_layers(found, removed, scores)
    families = [structure.coupled(block) for block in structure.blocks(loaded.model)]
    kept = width.keep(families, scores, found.sizes, found.layers, options.ranking)
    model, config = surgery.with_groups(
        loaded.model, loaded.config, kept, uniform=options.uniform, donate=True
    )
    layers = []
    for layer in range(len(families)):
        entry: dict[str, Any] = {"layer": layer}
        for kind, numbers in kept.items():
            values = scores[importance.name_of(layer, kind)]
            gone = np.setdiff1d(np.arange(len(values)), numbers[layer])
            entry[kind] = {
                "before": len(values),
                "after": len(numbers[layer]),
                "importance_removed": float(values[gone].sum() / max(values.sum(), 1e-30)),
                "removed": ranges(gone.tolist()),
            }
        layers.append(entry)
    return model, config, layers


def _removed_layers(found: Plan, removed: list[int], scores: Scores) -> list[dict[str, Any]]:
    values = scores.get(_STARTS)
    order = [int(i) for i in scores.get(_STEPS, np.array([]))]
    layers = []
    for layer in range(len(found.before.blocks)):
        entry: dict[str, Any] = {"layer": layer, "removed": layer in removed}
        if values is not None and not math.isnan(values[layer]):
            entry["score"] = float(values[layer])
        if layer in order:
            entry["step"] = order.index(layer) + 1
            entry["loss_after_step"] = float(scores[_LOSSES][order.index(layer)])
        layers.append(entry)
    return layers


def ranges(numbers: list[int]) -> str:
    """Return ``3,5-9`` for ascending ``[3, 5, 6, 7, 8, 9]``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)
