"""Width pruning: the new width of each layer, and the groups that it retains.

Invariant: MLP widths stay multiples of 64, and so do heads · head_dim where a number of heads
allows it, so that a pruned model can be quantized; a layer retains at least one group. With
``uniform`` every layer gets the same widths, which any toolkit reads; otherwise protected layers
are unchanged. Try it: ``mlx-slim prune MODEL -o DIR --ratio 0.2 --no-uniform``.
"""

from __future__ import annotations

import numpy as np

from mlx_slim.errors import SlimError
from mlx_slim.models.structure import HEADS, MLP, Coupled
from mlx_slim.pruning.counts import Counts
from mlx_slim.pruning.importance import Scores, name_of

MULTIPLE = 64  # the group size of quantization

# kind -> number of remaining groups, by layer
Sizes = dict[str, list[int]]
# kind -> ascending indices of the remaining groups, by layer
RetainedGroups = dict[str, list[np.ndarray]]


def allowed_sizes(family: Coupled, divided: int | None = None) -> list[int]:
    """Return the numbers of groups that may remain, descending, the present one first.

    Args:
        family: Of one layer.
        divided: A number that query heads must divide; None without that constraint.
    """
    if family.kind == MLP:
        whole = range(family.count // MULTIPLE * MULTIPLE, 0, -MULTIPLE)
        return [family.count, *(size for size in whole if size != family.count)]
    smaller = [
        n
        for n in range(1, family.count)
        if not divided or divided % (n * family.queries_per_group) == 0
    ]
    smaller = [n for n in smaller if n * family.width % MULTIPLE == 0] or smaller
    return [family.count, *reversed(smaller)]


def at_least(allowed: list[int], minimum: float) -> int:
    """Return the smallest allowed size of at least ``minimum``."""
    return min(size for size in allowed if size >= minimum - 1e-6)


def sizes_for(
    families: list[dict[str, Coupled]],
    ratio: float,
    kinds: tuple[str, ...],
    layers: list[int],
    divided: int | None = None,
) -> Sizes:
    """Return the sizes of all layers when at most ``ratio`` of the groups of ``layers`` is removed.

    ``divided``: see ``allowed_sizes``.
    """
    sizes: Sizes = {}
    for kind in kinds:
        sizes[kind] = [family_of[kind].count for family_of in families]
        for layer in layers:
            family = families[layer][kind]
            sizes[kind][layer] = at_least(
                allowed_sizes(family, divided), family.count * (1 - ratio)
            )
    return sizes


def sizes_within(
    families: list[dict[str, Coupled]],
    target: int,
    kinds: tuple[str, ...],
    layers: list[int],
    counts: Counts,
    divided: int | None = None,
) -> Sizes:
    """Return the largest sizes of at most ``target`` parameters, heads and neurons in proportion.

    Raises:
        SlimError: If even one group a layer is more.
    """
    guide = MLP if MLP in kinds else HEADS
    first = families[layers[0]][guide]
    allowed = allowed_sizes(first, divided)
    sizes: Sizes = {}
    for stays in allowed:
        sizes = sizes_for(families, 1 - stays / first.count, kinds, layers, divided)
        if counts.with_sizes(sizes) <= target:
            break
    else:
        sizes = sizes_for(families, 1.0, kinds, layers, divided)
        if counts.with_sizes(sizes) > target:
            raise SlimError(
                f"{target:,} parameters cannot be reached: the smallest of this kind has "
                f"{counts.with_sizes(sizes):,}",
                "remove layers too (--axis depth), or set a larger target",
            )
    if MLP in kinds:  # heads change in large steps: surplus parameters go to neurons
        for stays in allowed:
            wider = {**sizes, MLP: [*sizes[MLP]]}
            for layer in layers:
                wider[MLP][layer] = at_least(allowed_sizes(families[layer][MLP]), stays)
            if counts.with_sizes(wider) <= target:
                return wider
    return sizes


def retain(
    families: list[dict[str, Coupled]],
    scores: Scores,
    sizes: Sizes,
    layers: list[int],
    ranking: str,
) -> RetainedGroups:
    """Choose the groups that remain: those with the highest scores.

    Args:
        families: Of each layer.
        scores: Of every group.
        sizes: From ``sizes_for`` or ``sizes_within``.
        layers: Those that may shrink.
        ranking: ``layer`` retains exactly ``sizes``; ``global`` ranks the groups of all ``layers``
            in one list: as many are removed in total, those with the lowest scores.
    """
    retained: RetainedGroups = {}
    for kind, counts in sizes.items():
        if ranking == "global":
            counts = _spread(kind, families, scores, counts, layers)
        retained[kind] = []
        for layer, stays in enumerate(counts):
            order = np.argsort(-scores[name_of(layer, kind)], kind="stable")
            retained[kind].append(np.sort(order[:stays]))
    return retained


def _spread(
    kind: str,
    families: list[dict[str, Coupled]],
    scores: Scores,
    sizes: list[int],
    layers: list[int],
) -> list[int]:
    """Return sizes with the same sum over ``layers`` (at least), cut where scores are lowest.

    A layer goes from one allowed size to the next; the step whose groups have the lowest mean
    score is taken first.
    """
    steps = {layer: allowed_sizes(families[layer][kind]) for layer in layers}
    ascending = {layer: np.sort(scores[name_of(layer, kind)]) for layer in layers}
    at = dict.fromkeys(layers, 0)
    spread = [family_of[kind].count for family_of in families]
    excess = sum(spread[layer] - sizes[layer] for layer in layers)
    while excess > 0:
        best: tuple[float, int, int] | None = None
        for layer in layers:
            if at[layer] + 1 == len(steps[layer]):
                continue
            now, then = steps[layer][at[layer] : at[layer] + 2]
            if now - then > excess:
                continue
            gone = families[layer][kind].count - now
            mean = float(ascending[layer][gone : gone + now - then].mean())
            if best is None or mean < best[0]:
                best = (mean, layer, now - then)
        if best is None:
            break
        _, layer, removed = best
        at[layer] += 1
        spread[layer] -= removed
        excess -= removed
    return spread
