"""Peak memory, time and disk of a recipe, predicted before anything is loaded.

Invariant: weights, gradients, optimizer state and quantized bytes are exact (``shapes.py``);
activations are a fit to measured peaks of this loop, 3% off in the median and 20% at most where it
was fitted, up to 34% off outside of it (with checkpointing); nothing here depends on the weights.
Sizes are bytes of MLX memory (what ``mx.get_peak_memory`` counts); the Python process itself comes
on top. Try it: ``mlx-slim plan tinyllama-lora --budget 16GB``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx

from mlx_slim.analyze.shapes import Block, Shapes, shapes
from mlx_slim.analyze.work import Speed, Work, expected_work, predicted_seconds
from mlx_slim.config.schema import Recipe
from mlx_slim.runtime import cpu_lanes, dtype_name, memory_budget, on_gpu, resolve_dtype
from mlx_slim.train.losses import chunk_size
from mlx_slim.train.step import part_count

# Numbers that stay alive for each token of a block, per number of the quantity named: fitted to
# 290 measured peaks of random llama and phi models (width 128-512, 2-8 blocks, 256-512 tokens,
# all methods, float32), median error 3%, largest 20%. Per block, until its backward pass:
KEPT = {"width": 2.6, "norms": 1.85, "queries": 2.0, "keys": 0.2, "inner": 5.1, "scores": 1.08}
KEPT_DROPOUT = 1.2  # of the inputs of adapted layers: their dropped copies
KEPT_DORA = 1.0  # of the outputs of adapted layers: before they are scaled
KEPT_CHECKPOINTED = 1.4  # of the width: a checkpointed block keeps its input
# What exists besides, while one block is differentiated:
PASSING = {"width": 1.3, "queries": 5.4, "keys": 3.1, "inner": 3.2, "scores": 1.8}
RECOMPUTED = 1.4  # of a block's activations, when it is computed again
LOGITS = 3.0  # float32 copies of one chunk of logits
HEAD_GRADIENT = 3.0  # float32 copies of a trained head, while its gradient is summed
DENSE_HEAD = 1.7  # float32 copies of a quantized head, on a CPU
DENSE_LAYER = 1.5  # float32 copies of the largest quantized layer, on a CPU

_SAVED_STEPS_BESIDES = 2  # the best checkpoint, and the one being written


@dataclass(frozen=True)
class Suggestion:
    """Overrides that lower the peak: ``set`` goes on the command line as it is."""

    set: str
    predicted_peak_bytes: int


@dataclass(frozen=True)
class Prediction:
    """What a recipe will cost.

    Attributes:
        predicted_peak_bytes: Largest MLX memory in use during training.
        budget_bytes: What it may use.
        fits: Whether the peak is within the budget.
        predicted_seconds: Wall time of training; None without a speed or without rows to count.
        disk_bytes: The run folder at its largest (adapter or model, and its checkpoints).
        download_bytes: The model's 16-bit weights, if they come from a hub.
        breakdown: Parts of the peak: weights, gradients, optimizer, activations, logits.
        suggestions: Cheapest first.
        parameters: Numbers of the dense base.
        trainable_parameters: Numbers that are trained.
        dtype: Of computation.
        tokens: Real tokens of the whole run, and ``tokens_basis`` says how we know.
    """

    predicted_peak_bytes: int
    budget_bytes: int
    fits: bool
    predicted_seconds: float | None
    disk_bytes: int
    download_bytes: int
    breakdown: dict[str, int]
    parameters: int
    trainable_parameters: int
    dtype: str
    tokens: int | None
    tokens_basis: str
    suggestions: list[Suggestion] = field(default_factory=list)

    def as_record(self) -> dict[str, Any]:
        """Return the JSON object of ``plan --json``."""
        return asdict(self)


def predict(
    config: dict[str, Any],
    recipe: Recipe,
    *,
    lengths: Sequence[int] | None = None,
    budget: int | None = None,
    gpu: bool | None = None,
    speed: Speed | None = None,
    work: Work | None = None,
    suggest: bool = True,
) -> Prediction:
    """Predict what ``recipe`` costs over the model of ``config``.

    Args:
        config: ``config.json``, normalised (``models.load.read_config``).
        recipe: Checked recipe.
        lengths: Tokens of each training row, where known.
        budget: Bytes; None takes ``memory.budget``.
        gpu: Plan for a GPU (True), a CPU (False) or this machine (None).
        speed: Of the device; None leaves ``predicted_seconds`` out.
        work: Tokens of the run; None estimates them from the recipe's sources.
        suggest: Look for cheaper settings.

    Raises:
        SlimError: If the model cannot be built or a target matches nothing.
    """
    gpu = on_gpu() if gpu is None else gpu
    limit = memory_budget(recipe.memory.budget) if budget is None else budget
    found = _shapes(config, recipe, gpu)
    breakdown = _breakdown(found, recipe, lengths, gpu)
    peak = sum(breakdown.values())
    work = work or expected_work(recipe, lengths)
    seconds = predicted_seconds(found, recipe, work, speed, gpu=gpu) if speed and work else None
    return Prediction(
        predicted_peak_bytes=peak,
        budget_bytes=limit,
        fits=peak <= limit,
        predicted_seconds=seconds,
        disk_bytes=_disk(found, recipe, work),
        download_bytes=2 * found.parameters,
        breakdown=breakdown,
        parameters=found.parameters,
        trainable_parameters=found.trainable_parameters,
        dtype=dtype_name(_dtype(recipe, gpu)),
        tokens=work.tokens if work else None,
        tokens_basis=work.basis if work else "the rows are not counted yet",
        suggestions=_suggestions(config, recipe, lengths, limit, gpu, found) if suggest else [],
    )


def _dtype(recipe: Recipe, gpu: bool) -> mx.Dtype:
    name = recipe.train.dtype
    return resolve_dtype(name) if name != "auto" else (mx.bfloat16 if gpu else mx.float32)


def _shapes(config: dict[str, Any], recipe: Recipe, gpu: bool) -> Shapes:
    return shapes(config, recipe, _dtype(recipe, gpu))


def _largest_batch(recipe: Recipe, lengths: Sequence[int] | None) -> tuple[int, int]:
    """(row length, tokens) of the largest micro-batch, padding counted.

    Packed sequences are as long as ``max_length``, however short the rows.
    """
    train = recipe.train
    if lengths is None:
        return train.max_length, train.batch_tokens // train.max_length * train.max_length
    longest = min(max(lengths, default=train.max_length), train.max_length)
    rows = len(lengths) * longest
    if train.batching != "grouped":
        longest = min(train.max_length, sum(lengths))
    tokens = max(1, train.batch_tokens // longest) * longest
    return longest, max(1, min(tokens, rows))


def _numbers(block: Block, factors: dict[str, float], length: int) -> float:
    """Σ factor · quantity: numbers per token of one block. ``scores`` are heads · length."""
    quantities = {
        "width": block.width,
        "norms": block.norms * block.width,
        "queries": block.queries,
        "keys": block.keys,
        "inner": block.inner,
        "scores": block.heads * length,
    }
    return sum(factor * quantities[name] for name, factor in factors.items())


def _kept(block: Block, recipe: Recipe, length: int) -> float:
    """Numbers per token that a block keeps for its backward pass."""
    numbers = _numbers(block, KEPT, length)
    if recipe.method != "full" and recipe.adapter.dropout > 0:
        numbers += KEPT_DROPOUT * block.inputs
    if recipe.method == "dora":
        numbers += KEPT_DORA * block.outputs
    return numbers


def _breakdown(
    found: Shapes, recipe: Recipe, lengths: Sequence[int] | None, gpu: bool
) -> dict[str, int]:
    """Bytes of each part at the moment of the peak.

    The peak is the largest of three moments of the last micro-batch: the loss (all activations and
    a chunk of logits), the first block of the backward pass (all activations and that block's
    gradients on the way), its end (all parameter gradients and one block).
    """
    train, size = recipe.train, _dtype(recipe, gpu).size
    length, tokens = _largest_batch(recipe, lengths)
    full = recipe.method == "full"
    # On a CPU threads hold a part of the batch each (train/step.py), with logits of its own.
    lanes = 1 if gpu or full else cpu_lanes()
    parts = min(part_count(lanes, tokens), max(1, tokens // length))
    lanes = min(lanes, parts)
    tokens = -(-tokens // (parts * length)) * length * lanes
    widest = max(found.blocks, key=lambda block: _kept(block, recipe, length))
    if train.grad_checkpoint:
        kept = sum(KEPT_CHECKPOINTED * block.width for block in found.blocks)
        passing = RECOMPUTED * _kept(widest, recipe, length)
    else:
        kept = sum(_kept(block, recipe, length) for block in found.blocks)
        passing = 0.0
    kept_bytes = kept * tokens * size
    passing_bytes = (passing + _numbers(widest, PASSING, length)) * tokens * size
    chunk = min(chunk_size(found.vocabulary, train.loss_chunk), tokens // lanes)
    logits = LOGITS * 4 * chunk * found.vocabulary * lanes
    head = 4 * found.vocabulary * found.width
    if found.head_trains:
        kept_bytes += HEAD_GRADIENT * head
    if found.quantized and not gpu:
        logits += DENSE_HEAD * head * lanes
        passing_bytes += DENSE_LAYER * 4 * widest.largest * lanes
    fresh = found.trainable_bytes if full else 0
    moments = {
        "loss": (kept_bytes, logits, 0),
        "first": (kept_bytes + passing_bytes, 0.0, 0),
        "last": (passing_bytes, 0.0, fresh),
    }
    activations, logits, gradients = max(moments.values(), key=sum)
    # Summed over micro-batches (or held for clipping) there is one float32 gradient besides.
    if train.accumulate > 1 or not full:
        gradients += found.gradient_bytes
    return {
        "weights": found.base_bytes + found.adapter_bytes,
        "gradients": int(gradients),
        "optimizer": found.optimizer_bytes,
        "activations": int(activations),
        "logits": int(logits),
    }


def _disk(found: Shapes, recipe: Recipe, work: Work | None) -> int:
    """Bytes of the run folder at its largest."""
    checkpoint = found.trainable_bytes + found.optimizer_bytes
    result = found.trainable_bytes
    rows = 4 * work.tokens_per_epoch + work.tokens_per_epoch // 8 if work else 0
    return result + (recipe.train.keep + _SAVED_STEPS_BESIDES) * checkpoint + rows


def _variants(recipe: Recipe) -> list[dict[str, Any]]:
    """Changes that lower the peak, the one that costs least first."""
    train, found = recipe.train, []
    halves: dict[str, Any] = {
        "train.batch_tokens": max(train.max_length, train.batch_tokens // 2),
        "train.accumulate": train.accumulate * 2,
    }
    can_halve = train.batch_tokens > train.max_length
    if can_halve:  # the same step in smaller pieces
        found.append(halves)
    if not train.grad_checkpoint:  # one more forward pass
        found.append({"train.grad_checkpoint": True})
    quarter = max(train.max_length, train.batch_tokens // 4)
    small = {"train.batch_tokens": quarter, "train.accumulate": train.accumulate * 4}
    if quarter < halves["train.batch_tokens"]:
        found.append(small)
    both = {} if train.grad_checkpoint else {"train.grad_checkpoint": True}
    least = {
        "train.batch_tokens": train.max_length,
        "train.accumulate": train.accumulate * -(-train.batch_tokens // train.max_length),
    }
    if can_halve:
        found += [{**both, **halves}, {**both, **least}]
    if train.max_length > 256:  # longer rows are lost
        shorter = {"train.max_length": 256, "train.batch_tokens": min(train.batch_tokens, 512)}
        found.append({**both, **shorter})
    if recipe.method == "full":
        found.append({"train.optimizer": "adafactor"})
        found.append({"method": "lora"})
    if recipe.method != "qlora":
        found += [{"method": "qlora"}, {"method": "qlora", **both, **(least if can_halve else {})}]
    unique: list[dict[str, Any]] = []
    for change in found:
        if change and change not in unique:
            unique.append(change)
    return unique


def _changed(recipe: Recipe, change: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for key, value in change.items():
        section, _, name = key.rpartition(".")
        if section:
            sections.setdefault(section, {})[name] = value
        else:
            values[name] = value
    for section, update in sections.items():
        values[section] = getattr(recipe, section).model_copy(update=update)
    return recipe.model_copy(update=values)


def _suggestions(
    config: dict[str, Any],
    recipe: Recipe,
    lengths: Sequence[int] | None,
    limit: int,
    gpu: bool,
    found: Shapes,
) -> list[Suggestion]:
    """Changes that save at least 3%, cheapest first; those that fit stand before the others."""
    peak = sum(_breakdown(found, recipe, lengths, gpu).values())
    counted = {(recipe.method, recipe.train.optimizer): found}
    result = []
    for change in _variants(recipe):
        other = _changed(recipe, change)
        key = (other.method, other.train.optimizer)
        if key not in counted:
            counted[key] = _shapes(config, other, gpu)
        lower = sum(_breakdown(counted[key], other, lengths, gpu).values())
        if lower < 0.97 * peak:
            text = " ".join(f"{name}={_yaml(value)}" for name, value in change.items())
            result.append(Suggestion(text, lower))
    return sorted(result, key=lambda s: s.predicted_peak_bytes > limit)


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
