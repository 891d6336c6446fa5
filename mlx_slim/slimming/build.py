"""Candidates in memory, to rank them, and on disk, recovered: cut, learn from the original, round.

Invariant: one model is in memory at a time. A step that is complete on disk is not repeated:
``pruned-N``, ``recover`` (a run folder with its recipe), ``model``. What is ranked and what is made
are cut by the same scores. Try it: ``mlx-slim slim MODEL -o DIR --disk 200MB --task arc_easy``.

Shapes: N rows, T tokens a row.
"""

from __future__ import annotations

import time
from pathlib import Path

import mlx.core as mx

from mlx_slim.artifacts import write_json
from mlx_slim.cluster.machines import machine
from mlx_slim.events import Observer
from mlx_slim.models import fidelity
from mlx_slim.models.load import Loaded, load, read_config
from mlx_slim.models.quantized import LayerFormat
from mlx_slim.models.recorded_logits import RecordedLogits, free_weights
from mlx_slim.models.tensors import folder_tensors
from mlx_slim.models.verified_save import compute_dtype, stored_dtype
from mlx_slim.pruning.options import PruneOptions
from mlx_slim.pruning.run import prune, prune_loaded
from mlx_slim.pruning.surgery import text_part
from mlx_slim.quantization.apply import quantize_model
from mlx_slim.quantization.budget import space_of
from mlx_slim.quantization.heuristics import heuristic_losses
from mlx_slim.quantization.options import CompressOptions
from mlx_slim.quantization.run import compress
from mlx_slim.runtime import memory_limits
from mlx_slim.slimming.block_training import LENGTH, rows_of
from mlx_slim.slimming.candidate import Candidate, Cut
from mlx_slim.slimming.folder import MODEL
from mlx_slim.slimming.material import Material
from mlx_slim.slimming.records import MeasuredSpeed
from mlx_slim.slimming.recovery import recipe_of, recover, recovers

SIZE = "size.json"  # in the folder of a candidate
_SPEED_PROMPT, _SPEED_ANSWER, _SPEED_ROUNDS = 512, 64, 3


@memory_limits()
def distance(
    material: Material, candidate: Candidate, original: RecordedLogits, rows_NT: mx.array
) -> fidelity.Fidelity:
    """Return the distance of an unrecovered candidate from the original."""
    loaded = load(material.source, revision=material.revision, dtype=compute_dtype())
    loaded.model.eval()
    for index, cut in enumerate(candidate.cuts):
        total = text_part(loaded.config)["num_hidden_layers"]
        options = cut.options(total, material.data, material.revision)
        loaded = prune_loaded(loaded, options, scores_at=material.scores_at(candidate, index))
    if candidate.quantize is not None:
        formats = _formats(material, candidate, loaded)
        quantize_model(loaded.model, loaded.config, candidate.quantize, formats=formats)
    measured = fidelity.compare(original, loaded.model, rows_NT)
    free_weights(loaded.model)
    return measured


def _formats(
    material: Material, candidate: Candidate, loaded: Loaded
) -> dict[str, LayerFormat | None] | None:
    """Return the formats of a candidate whose layers have bits of their own; None of another."""
    if candidate.bits_per_weight is None:
        return None
    options = compress_options(material, candidate)
    stored = stored_dtype(folder_tensors(loaded.path))
    space = space_of(loaded.model, options.quantize, stored)
    losses = heuristic_losses(space.shapes, space.blocks)
    choices = space.choose(losses, space.limit(options))
    return {path: choice.format for path, choice in choices.items()}


def make(material: Material, candidate: Candidate, folder: Path, observer: Observer) -> None:
    """Make ``folder/model``, and note its bytes, and this machine, in ``size.json``.

    Args:
        material: What it is made of.
        candidate: What it is; the recipe of its recovery is in the folder.
        folder: Of this candidate.
        observer: Gets every event.

    Raises:
        ResourceError: If memory or disk do not suffice.
        SlimError: As ``prune``, ``distill`` and ``compress`` do.
    """
    if not (folder / MODEL).exists():
        dense = _pruned(material, candidate, folder, observer)
        if recovers(candidate):
            recover(material, candidate, dense, folder, observer)
        else:
            assert candidate.quantize is not None, "the original is no candidate"
            options = compress_options(material, candidate, rows_of(folder))
            compress(dense, folder / MODEL, options, observer)
    files = [path for path in (folder / MODEL).iterdir() if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    write_json(folder / SIZE, {"disk_bytes": size, "provenance": machine()})


def recovered(candidate: Candidate, folder: Path) -> str:
    """Return by what a candidate was recovered; empty without."""
    if recovers(candidate):
        return recipe_of(folder).recipe.method
    return "blocks" if rows_of(folder) else ""


def compress_options(material: Material, candidate: Candidate, rows: int = 0) -> CompressOptions:
    """Return how a candidate that is not recovered is quantized.

    Args:
        material: What it is made of.
        candidate: What it is.
        rows: That its blocks are trained on; 0 rounds.
    """
    assert candidate.quantize is not None
    training = {"method": "blockwise", "samples": rows, "length": LENGTH} if rows else {}
    return CompressOptions(
        candidate.quantize,
        calibration=material.data,
        fidelity_samples=0,
        revision=material.revision,
        bits_per_weight=candidate.bits_per_weight,
        sensitivity=None if candidate.bits_per_weight is None else "rules",
        **training,
    )


def _pruned(material: Material, candidate: Candidate, folder: Path, observer: Observer) -> str:
    """Return the dense model after all cuts; the original where there are none."""
    source = material.source
    for index, cut in enumerate(candidate.cuts):
        out = folder / f"pruned-{index + 1}"
        if not out.exists():
            options = _cut_options(material, cut, source, index)
            scores_at = material.scores_at(candidate, index)
            prune(source, out, options, observer, scores_at=scores_at)
        source = str(out)
    return source


def _cut_options(material: Material, cut: Cut, source: str, index: int) -> PruneOptions:
    """Return the options of a cut of the model in ``source``."""
    revision = material.revision if index == 0 else None
    config = read_config(source, revision)
    return cut.options(text_part(config)["num_hidden_layers"], material.data, revision)


@memory_limits()
def speed_beside(original: str, model: Path, revision: str | None) -> MeasuredSpeed:
    """Measure a model between two measurements of the original, on this machine.

    Returns:
        Tokens per second, medians of three rounds; ratios to the mean of the original's two.
    """
    before = _speed(original, revision)
    prefill, generation = _speed(str(model), None)
    after = _speed(original, revision)
    return MeasuredSpeed(
        prefill,
        generation,
        2 * prefill / (before[0] + after[0]),
        2 * generation / (before[1] + after[1]),
    )


def _speed(source: str, revision: str | None) -> tuple[float, float]:
    """Return tokens per second of reading a prompt and of writing an answer."""
    from mlx_lm.models.cache import make_prompt_cache

    loaded = load(source, revision=revision, dtype=compute_dtype())
    loaded.model.eval()
    vocabulary = loaded.model(mx.array([[0]])).shape[-1]
    prompt_1T = (mx.arange(_SPEED_PROMPT) * 7919 % vocabulary)[None]
    rounds = []
    for _ in range(_SPEED_ROUNDS + 1):  # the first one warms up
        cache = make_prompt_cache(loaded.model)
        tic = time.perf_counter()
        token = mx.argmax(loaded.model(prompt_1T, cache=cache)[:, -1:], axis=-1)
        mx.eval(token)
        read = time.perf_counter()
        for _ in range(_SPEED_ANSWER):
            token = mx.argmax(loaded.model(token, cache=cache), axis=-1)
            mx.eval(token)
        rounds.append((_SPEED_PROMPT / (read - tic), _SPEED_ANSWER / (time.perf_counter() - read)))
    free_weights(loaded.model)
    prefill, generation = (sorted(values)[1] for values in zip(*rounds[1:], strict=True))
    return prefill, generation
