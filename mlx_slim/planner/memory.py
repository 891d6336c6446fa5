"""Peak memory, time and disk of a recipe, predicted before anything is loaded.

Invariant: nothing here depends on the weights, and nothing is evaluated. Sizes are bytes of MLX
memory (as ``mx.get_peak_memory`` counts); the Python process itself is not included. The peak is
computed in ``peak.py``. Try it: ``mlx-slim plan tinyllama-lora --budget 16GB``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import mlx.core as mx

from mlx_slim.config.schema import Recipe
from mlx_slim.errors import SlimError
from mlx_slim.models.attention import fused_here, has_fused_backward
from mlx_slim.models.build import build
from mlx_slim.planner.drawing import drawing_bytes, with_answers
from mlx_slim.planner.peak import breakdown
from mlx_slim.planner.shapes import TrainingShapes, leaves, to_dtype, training_shapes
from mlx_slim.planner.sharded import among_ranks, loading_bytes
from mlx_slim.planner.suggest import Suggestion, changed, suggestions
from mlx_slim.planner.time import Machine, Range, estimate
from mlx_slim.planner.work import (
    Operations,
    Speed,
    TrainingWork,
    expected_work,
    operations,
    predicted_seconds,
)
from mlx_slim.reading import JsonObject, ModelConfig
from mlx_slim.runtime import (
    AUTO_FRACTION,
    DTYPES,
    device_memory,
    dtype_name,
    memory_budget,
    on_gpu,
    resolve_dtype,
)

_EXTRA_CHECKPOINTS = 2  # the best checkpoint, and the one being written
# Suggestions are ranked by ratios of time; without a measured device, by those of operations.
_ANY_SPEED = Speed(flops=1e12, exponential=1e-12, element=1e-11)
# word in a parameter's path -> group of weights in ``analyze memory``
_GROUPS = {
    "embed": "embedding",
    "lm_head": "head",
    "attn": "attention",
    "mlp": "mlp",
    "norm": "norms",
}


@dataclass(frozen=True)
class Measurement:
    """Cost of a few real steps, as ``plan --json`` has it.

    Attributes:
        peak_bytes: MLX peak of the steps.
        predicted_peak_bytes: What was predicted without measuring.
        seconds_per_batch: Median time of the largest micro-batch.
        batch_tokens: Its positions.
        steps: Optimizer steps taken.
    """

    peak_bytes: int
    predicted_peak_bytes: int
    seconds_per_batch: float
    batch_tokens: int
    steps: int


@dataclass(frozen=True)
class Prediction:
    """The predicted cost of a recipe.

    Attributes:
        predicted_peak_bytes: Largest MLX memory in use, while the base is loaded or in training.
        loading_peak_bytes: While the base is loaded.
        budget_bytes: Memory that it may use.
        fits: Whether the peak is within the budget.
        predicted_seconds: Wall time of training; None without a speed or without rows to count.
        time_range: An estimate of it from a machine's peak; None without one or without rows.
        time_basis: What that estimate assumes, as text; empty without a machine.
        disk_bytes: The run folder at its largest (adapter or model, its checkpoints, and the base
            if the run quantizes it).
        download_bytes: The model's 16-bit weights; 0 if it is a local folder.
        breakdown: Bytes of the peak by kind: weights, gradients, optimizer, activations, logits,
            and ``answers``: a batch of drawn answers, where that is the peak; ``loading``: what
            loading needs besides the weights, where that is.
        parameters: Numbers of the dense base.
        trainable_parameters: Numbers that are trained.
        dtype: Of computation.
        tokens: Real tokens of the whole run.
        tokens_basis: How they were counted, as text.
        rules_of_thumb: Two common formulas in bytes, for comparison: ``inference_formula``,
            M = P·4/(32/Q)·1.2, and ``twelve_times``, 12 x the model, for full fine-tuning.
        measured: Of ``--probe``; None without.
        suggestions: Settings that need less: those that fit first, then by cost.
    """

    predicted_peak_bytes: int
    loading_peak_bytes: int
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
    rules_of_thumb: dict[str, int]
    measured: Measurement | None = None
    time_range: Range | None = None
    time_basis: str = ""
    suggestions: list[Suggestion] = field(default_factory=list)

    def as_record(self) -> JsonObject:
        """Return the JSON object of ``plan --json``."""
        return asdict(self)


def predict(
    config: ModelConfig,
    recipe: Recipe,
    *,
    lengths: Sequence[int] | None = None,
    budget: int | None = None,
    gpu: bool | None = None,
    gpu_bytes: int | None = None,
    speed: Speed | None = None,
    machine: Machine | None = None,
    work: TrainingWork | None = None,
    local: bool = True,
    suggest: bool = True,
    ranks: int = 1,
) -> Prediction:
    """Predict the cost of ``recipe`` with the model of ``config``.

    Args:
        config: ``config.json``, normalised (``models.load.read_config``).
        recipe: Checked recipe.
        lengths: Tokens of each training row, if they are counted already.
        budget: Bytes; None takes ``memory.budget``.
        gpu: Plan for a Mac's GPU (True), a CPU (False) or this machine (None).
        gpu_bytes: Memory of that GPU; None takes this machine's, or that whose default budget is
            ``budget``.
        speed: Of the device; None leaves ``predicted_seconds`` out.
        machine: Whose peak rates estimate the time (``planner.time``); None leaves it out.
        work: Tokens of the run; None estimates them from the recipe's rows, if they can be read.
        local: Read the rows on this machine; else the hub's are meant.
        suggest: Look for cheaper settings.
        ranks: Of the run: what ``train.shard=full`` cuts the model among.

    Raises:
        SlimError: If the model cannot be built or a target matches nothing.
    """
    fused = fused_here() if gpu is None else gpu and has_fused_backward()
    gpu = on_gpu() if gpu is None else gpu
    limit = memory_budget(recipe.memory.budget) if budget is None else budget
    if gpu_bytes is None:
        gpu_bytes = device_memory() if on_gpu() else int(limit / AUTO_FRACTION)
    if work is None:
        with contextlib.suppress(SlimError):
            work = expected_work(recipe, lengths, local=local)
    work = work and with_answers(recipe, work)
    cached: dict[tuple[str, str], TrainingShapes] = {}  # by the settings that change them

    def shapes_of(recipe: Recipe) -> TrainingShapes:
        key = (recipe.method, recipe.train.optimizer)
        if key not in cached:
            cached[key] = training_shapes(config, recipe, _dtype(recipe, gpu))
        return cached[key]

    def is_fused(recipe: Recipe) -> bool:
        return fused and recipe.train.batching != "packed"  # whose mask of segments is an array

    def breakdown_of(recipe: Recipe) -> dict[str, int]:
        shapes, size = shapes_of(recipe), _dtype(recipe, gpu).size
        device = gpu, gpu_bytes, is_fused(recipe)
        loading = loading_of(recipe)
        if recipe.train.shard == "full" and ranks > 1:
            again = changed(recipe, {"train.grad_checkpoint": True})  # as sharded blocks are
            by_kind = breakdown(shapes, again, size, lengths, *device)
            return _largest(shapes, among_ranks(by_kind, shapes, recipe, ranks), 0, loading)
        training = breakdown(shapes, recipe, size, lengths, *device)
        room = limit - training["weights"] - training["optimizer"]
        drawing = drawing_bytes(config, recipe, size, lengths, max(0, room))
        return _largest(shapes, training, drawing, loading)

    def loading_of(recipe: Recipe) -> int:
        shapes = shapes_of(recipe)
        sharded = recipe.train.shard == "full" and ranks > 1
        return loading_bytes(shapes, ranks) if sharded else shapes.loading_bytes

    def operations_of(recipe: Recipe) -> Operations:
        tokens = work or TrainingWork(1 << 20, 1 << 20, recipe.train.max_length, "")
        if not gpu and recipe.train.compile is not True and _has_prefix_sharing(recipe):
            pairs = recipe.preference_rows == "pairs"
            tokens = tokens.sharing(recipe.train.batch_tokens, pairs=pairs)
        size = _dtype(recipe, gpu).size
        return operations(shapes_of(recipe), recipe, tokens, size=size, fused=is_fused(recipe))

    def cost_of(recipe: Recipe) -> tuple[int, float]:
        run = operations_of(recipe)
        if machine is None:
            seconds = predicted_seconds(run, speed or _ANY_SPEED, gpu=gpu)
        else:
            time = estimate(run, machine)
            seconds = math.sqrt(time.low * time.high)
        return sum(breakdown_of(recipe).values()), seconds

    shapes, by_kind = shapes_of(recipe), breakdown_of(recipe)
    peak, run = sum(by_kind.values()), operations_of(recipe)
    return Prediction(
        predicted_peak_bytes=peak,
        loading_peak_bytes=loading_of(recipe),
        budget_bytes=limit,
        fits=peak <= limit,
        predicted_seconds=(
            predicted_seconds(run, speed, gpu=gpu) / recipe.train.duty if speed and work else None
        ),
        disk_bytes=_disk(shapes, recipe, work),
        download_bytes=0 if Path(recipe.model).expanduser().exists() else 2 * shapes.parameters,
        breakdown=by_kind,
        parameters=shapes.parameters,
        trainable_parameters=shapes.trainable_parameters,
        dtype=dtype_name(_dtype(recipe, gpu)),
        tokens=work.tokens if work else None,
        tokens_basis=work.basis if work else "the rows are not counted yet",
        rules_of_thumb=rules_of_thumb(shapes, recipe, _dtype(recipe, gpu)),
        time_range=(
            estimate(run, machine).scaled(1 / recipe.train.duty) if machine and work else None
        ),
        time_basis=machine.basis if machine else "",
        suggestions=suggestions(recipe, limit, cost_of) if suggest else [],
    )


def _largest(
    shapes: TrainingShapes, training: dict[str, int], drawing: int, loading: int
) -> dict[str, int]:
    """Return the breakdown of the largest peak: of training, of drawing answers, or of loading."""
    answering = {**training, "gradients": 0, "activations": 0, "logits": 0, "answers": drawing}
    training = max({**training, "answers": 0}, answering, key=lambda kinds: sum(kinds.values()))
    if loading <= sum(training.values()):
        return {**training, "loading": 0}
    more = shapes.loading_bytes - shapes.base_bytes
    return {**dict.fromkeys(training, 0), "weights": loading - more, "loading": more}


def _has_prefix_sharing(recipe: Recipe) -> bool:
    train = recipe.train
    if recipe.preference is not None and train.prefix_sharing == "auto" and recipe.adapter.dropout:
        return False
    return train.prefix_sharing is not False and train.batching != "packed"


def _dtype(recipe: Recipe, gpu: bool) -> mx.Dtype:
    name = recipe.train.dtype
    return resolve_dtype(name) if name != "auto" else (mx.bfloat16 if gpu else mx.float32)


def rules_of_thumb(shapes: TrainingShapes, recipe: Recipe, dtype: mx.Dtype) -> dict[str, int]:
    """Return the estimates of two common formulas, in bytes; neither is the need of training.

    ``inference_formula``: M = P · 4 / (32 / Q) · 1.2 with P parameters loaded at Q bits: weights
    and a fifth more, for inference. ``twelve_times``: 12 x the weights, for full fine-tuning.
    """
    bits = recipe.quantize.bits if recipe.method == "qlora" else 8 * dtype.size
    return {
        "inference_formula": int(shapes.parameters * 4 / (32 / bits) * 1.2),
        "twelve_times": 12 * shapes.parameters * dtype.size,
    }


def _disk(shapes: TrainingShapes, recipe: Recipe, work: TrainingWork | None) -> int:
    """Bytes of the run folder at its largest."""
    checkpoint = shapes.trainable_bytes + shapes.optimizer_bytes
    result = shapes.trainable_bytes
    if recipe.quantize.qat:
        bits = recipe.quantize.bits + 32 / recipe.quantize.group_size
        result += int(shapes.parameters * bits / 8)
    if shapes.quantized_here:
        result += shapes.base_bytes
    rows = 4 * work.tokens_per_epoch + work.tokens_per_epoch // 8 if work else 0
    rows += _target_bytes(shapes, recipe, work) if work else 0
    extra = _EXTRA_CHECKPOINTS + (recipe.train.schedule == "wsd")  # one from before the decay
    return result + (recipe.train.keep + extra) * checkpoint + rows


def _target_bytes(shapes: TrainingShapes, recipe: Recipe, work: TrainingWork) -> int:
    """Bytes of teachers' targets in the run folder (``distillation/target_cache.py``)."""
    distill = recipe.distill
    if (
        distill is None
        or distill.cache
        or distill.method not in ("auto", "logits", "uld", "on-policy")
    ):
        return 0
    top_k = shapes.vocabulary if distill.top_k == "all" else min(distill.top_k, shapes.vocabulary)
    fraction = work.supervised if recipe.data.mask_prompt else 1.0
    a_token = top_k * (6 if shapes.vocabulary <= 1 << 16 else 8) + 4
    read = min(work.tokens, work.tokens_per_epoch)
    return int(fraction * read) * a_token * len(distill.teachers)


def weight_bytes(config: ModelConfig) -> dict[str, int]:
    """Return the bytes of a model's weights by kind, in the dtypes of its config.

    Floating weights without a dtype in the config are bfloat16.
    """
    model = build(config)
    name = str(config.get("dtype") or config.get("torch_dtype"))
    to_dtype(model, DTYPES.get(name, mx.bfloat16))
    sizes: dict[str, int] = {}
    for path, value in leaves(model):
        group = next((group for word, group in _GROUPS.items() if word in path), "other")
        sizes[group] = sizes.get(group, 0) + value.nbytes
    return sizes
