"""Scores of what can be removed, and the cut itself, in memory.

Invariant: what is cut is what the scores say, and the original's weights are freed as it is cut.
Used by ``pruning/run.py``. Try it: ``mlx-slim prune MODEL -o DIR --ratio 0.2``.

Shapes: N rows, T tokens a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim.artifacts import atomic_file, load_tensors, save_tensors
from mlx_slim.models.kinds import HIDDEN
from mlx_slim.models.load import Loaded
from mlx_slim.models.mixtures import mixture_of
from mlx_slim.models.recorded_logits import free_weights
from mlx_slim.models.streamed import (
    Unread,
    Weights,
    count_of_blocks,
    weights_of,
    with_fast_forwards,
)
from mlx_slim.pruning import importance, surgery, width
from mlx_slim.pruning.depth import choose_layers, least_influential
from mlx_slim.pruning.families import families_of
from mlx_slim.pruning.methods import BLOCK_INFLUENCE
from mlx_slim.pruning.options import NAMED, PruneOptions
from mlx_slim.pruning.plan import Plan
from mlx_slim.pruning.records import GroupChange, LayerChange
from mlx_slim.pruning.refit import refit
from mlx_slim.pruning.scores import Scores, name_of
from mlx_slim.reading import ModelConfig
from mlx_slim.runtime import memory_budget

_LAYERS, _STARTS, _STEPS, _LOSSES = "layers.removed", "layers.score", "steps.layer", "steps.loss"


def score(
    loaded: Loaded | Unread,
    options: PruneOptions,
    planned: Plan,
    seen_NT: mx.array | None,
    notify: Callable[..., None],
    scores_at: Path | None,
) -> Scores:
    """Return the scores in the file ``scores_at``; measure them, into it, where it is not there."""
    if scores_at is not None and scores_at.exists():
        notify(f"scores read from {scores_at}")
        return {name: np.array(value) for name, value in load_tensors(scores_at).items()}
    scores = _measure(loaded, options, planned, seen_NT, notify)
    if scores_at is not None:
        _save(scores_at, scores)
    return scores


def _save(path: Path, scores: Scores) -> None:
    with atomic_file(path) as temporary:
        save_tensors(temporary, {name: mx.array(value) for name, value in scores.items()})


def _measure(
    loaded: Loaded | Unread,
    options: PruneOptions,
    planned: Plan,
    seen_NT: mx.array | None,
    notify: Callable[..., None],
) -> Scores:
    """Return every score; of a depth method that looks at the count, also the layers it removes."""
    if planned.method == NAMED:
        return {_LAYERS: np.array(planned.removed, np.int32)}
    rows = "" if seen_NT is None else f" on {len(seen_NT)} rows of {seen_NT.shape[1]} tokens"
    notify(f"measuring {planned.method}{rows}")
    if planned.axis == "width":
        budget = memory_budget("auto") - mx.get_active_memory()
        return importance.group_importance(
            weights_of(loaded),
            planned.method,
            planned.kinds,
            seen_NT,
            seed=options.seed,
            budget=budget,
            mixture=mixture_of(loaded.config),
        )
    removal = choose_layers(
        weights_of(loaded),
        planned.method,
        planned.count,
        planned.layers,
        seen_NT,
        seed=options.seed,
        special=set(getattr(loaded.tokenizer, "all_special_ids", []) or []),
    )
    total = count_of_blocks(weights_of(loaded))
    scores = np.array([removal.scores.get(i, math.nan) for i in range(total)], np.float32)
    if planned.method == BLOCK_INFLUENCE:
        return {_STARTS: scores}  # of every count
    result: Scores = {_LAYERS: np.array(removal.layers, np.int32), _STARTS: scores}
    if removal.steps:
        result[_STEPS] = np.array([layer for layer, _ in removal.steps], np.int32)
        result[_LOSSES] = np.array([loss for _, loss in removal.steps], np.float32)
    return result


def meaning(planned: Plan) -> str:
    """Return the meaning of the scores of ``planned``."""
    return {
        BLOCK_INFLUENCE: "block influence",
        "angular": f"angle/π over {planned.count} layers from here",
        "perplexity": "nats a token without it",
    }.get(planned.method, planned.method)


@dataclass(frozen=True)
class Changes:
    """What a model lost: of each layer, and of the residual stream; notes for the user."""

    layers: list[LayerChange]
    hidden: GroupChange | None = None
    notes: Sequence[str] = ()


def cut(
    loaded: Loaded | Unread,
    options: PruneOptions,
    planned: Plan,
    scores: Scores,
    refit_NT: mx.array | None,
) -> tuple[Weights, ModelConfig, Changes]:
    """Return the pruned model, its config, and what changed; of an unread one, what opens it.

    A model in memory loses its weights, so that those that are cut off are freed. What reads the
    pruned groups is refitted on ``refit_NT``, where there are such rows.
    """
    if planned.axis == "depth":
        removed = _chosen(planned, scores)

        def without(model: nn.Module) -> tuple[nn.Module, ModelConfig]:
            read = isinstance(loaded, Loaded)
            return surgery.without_layers(model, loaded.config, removed, read=read)

        model, new = _cut(loaded, without)
        return model, new, Changes(_removed_layers(planned, removed, scores))
    mixture = mixture_of(loaded.config)
    families = families_of(loaded.model if isinstance(loaded, Loaded) else loaded.open(), mixture)
    retained = width.retain(
        families,
        scores,
        planned.sizes,
        planned.layers,
        options.ranking,
        runs=mixture.groups if mixture else 1,
    )
    notes: list[str] = []
    if refit_NT is not None:
        assert isinstance(loaded, Loaded)
        if left := refit(loaded.model, retained, refit_NT):
            as_they_are = sum(one == 1 for one in left)
            notes.append(
                f"{len(left) - as_they_are} layers refitted on {refit_NT.size:,} tokens: "
                f"{sum(left) / len(left):.1%} of the square error is left on the half that chose "
                "how far" + f"; {as_they_are} stay as they are" * (as_they_are > 0)
            )

    def narrowed(model: nn.Module) -> tuple[nn.Module, ModelConfig]:
        read = isinstance(loaded, Loaded)
        return surgery.with_groups(
            model, loaded.config, retained, uniform=options.uniform, donate=read, read=read
        )

    model, config = _cut(loaded, narrowed)
    changes: list[dict[str, GroupChange]] = []
    for layer in range(len(families)):
        changes.append({})
        for kind, numbers in retained.items():
            if not len(numbers[layer]):  # a layer without experts
                continue
            values = scores[name_of(layer, kind)]
            removed = np.setdiff1d(np.arange(len(values)), numbers[layer])
            changes[-1][kind] = GroupChange(
                before=len(values),
                after=len(numbers[layer]),
                importance_removed=float(values[removed].sum() / max(values.sum(), 1e-30)),
                removed=ranges(removed.tolist()),
            )
    channels = [groups.pop(HIDDEN, None) for groups in changes]
    layers = [LayerChange(layer, groups) for layer, groups in enumerate(changes)]
    return model, config, Changes(layers, channels[0], notes)


def _chosen(planned: Plan, scores: Scores) -> list[int]:
    """Return the layers that go: what was measured for one count serves for another."""
    if planned.method == BLOCK_INFLUENCE:
        return least_influential(scores[_STARTS], planned.count, planned.layers)
    return [int(i) for i in scores[_LAYERS]]


def _cut(
    loaded: Loaded | Unread, change: Callable[[nn.Module], tuple[nn.Module, ModelConfig]]
) -> tuple[Weights, ModelConfig]:
    """Return what ``change`` makes of a model, or what opens that, and its config."""
    if isinstance(loaded, Unread):
        return with_fast_forwards(lambda: change(loaded.open())[0]), change(loaded.open())[1]
    model, config = change(loaded.model)
    free_weights(loaded.model)
    return model, config


def _removed_layers(planned: Plan, removed: list[int], scores: Scores) -> list[LayerChange]:
    values = scores.get(_STARTS)
    order = [int(i) for i in scores.get(_STEPS, np.array([]))]
    layers = []
    for layer in range(len(planned.before.blocks)):
        change = LayerChange(layer, removed=layer in removed)
        if values is not None and not math.isnan(values[layer]):
            change = replace(change, score=float(values[layer]))
        if layer in order:
            step = order.index(layer)
            change = replace(change, step=step + 1, loss_after_step=float(scores[_LOSSES][step]))
        layers.append(change)
    return layers


def ranges(numbers: list[int]) -> str:
    """Return ``3,5-9`` for ascending ``[3, 5, 6, 7, 8, 9]``."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][-1] == number - 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return ",".join("-".join(map(str, part)) for part in ranges)
