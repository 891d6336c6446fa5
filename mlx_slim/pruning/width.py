"""Width pruning: the new width of each layer, and the groups that it retains.

Invariant: the widths of the MLP and of the residual stream stay multiples of 64, and so do
heads · head_dim where a number of heads allows it, so that a pruned model can be quantized; a layer
retains at least one group. With
``uniform`` every layer gets the same widths, which any toolkit reads; otherwise protected layers
are unchanged. Try it: ``mlx-slim prune MODEL -o DIR --ratio 0.2 --no-uniform``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mlx_slim.errors import SlimError
from mlx_slim.models.kinds import EXPERTS, HEADS, HIDDEN, MLP
from mlx_slim.models.mixtures import Mixture
from mlx_slim.models.structure import Coupled
from mlx_slim.pruning.counts import Counts
from mlx_slim.pruning.methods import SIZE_FLAGS
from mlx_slim.pruning.scores import Scores, name_of

MULTIPLE = 64  # the group size of quantization

# kind -> number of remaining groups, by layer
Sizes = dict[str, list[int]]
# kind -> ascending indices of the remaining groups, by layer
RetainedGroups = dict[str, list[np.ndarray]]


@dataclass(frozen=True)
class WidthLimits:
    """What a config with the same widths in all layers can express.

    Attributes:
        head_dim_is_derived: The size of a head is hidden_size ÷ heads: the residual stream shrinks
            with whole heads or not at all.
        heads_divide_hidden: The number of query heads must divide hidden_size.
    """

    head_dim_is_derived: bool = False
    heads_divide_hidden: bool = False


ANY = WidthLimits()


def allowed_sizes(
    families: dict[str, Coupled], kind: str, kinds: tuple[str, ...], limits: WidthLimits = ANY
) -> list[int]:
    """Return the numbers of groups that may remain, descending, the present one first.

    Args:
        families: Of one layer.
        kind: That of the groups.
        kinds: All kinds that shrink.
        limits: Of the config.
    """
    family = families[kind]
    if kind != HEADS:
        whole = range(family.count // MULTIPLE * MULTIPLE, 0, -MULTIPLE)
        return [family.count, *(size for size in whole if size != family.count)]
    smaller = list(range(family.count - 1, 0, -1))
    if limits.heads_divide_hidden:
        hidden = families[HIDDEN].count
        smaller = [n for n in smaller if hidden % (n * family.queries_per_group) == 0]
    whole = [n for n in smaller if n * family.width % MULTIPLE == 0]
    if limits.head_dim_is_derived and HIDDEN in kinds:
        return [family.count, *whole]
    return [family.count, *(whole or smaller)]


def hidden_sizes(families: dict[str, Coupled], groups: int, limits: WidthLimits) -> list[int]:
    """Return the widths that the residual stream may have beside ``groups`` key-value heads.

    Descending; the present width is the first one where it is possible.
    """
    heads, width = families[HEADS], families[HIDDEN].count
    if limits.head_dim_is_derived:
        return [groups * heads.width]
    step = MULTIPLE
    if limits.heads_divide_hidden:
        step = math.lcm(step, groups * heads.queries_per_group)
    return [width, *(size for size in range(width // step * step, 0, -step) if size != width)]


def at_least(allowed: list[int], minimum: float) -> int:
    """Return the smallest allowed size of at least ``minimum``."""
    return min(size for size in allowed if size >= minimum - 1e-6)


def sizes_for(
    families: list[dict[str, Coupled]],
    ratio: float,
    kinds: tuple[str, ...],
    layers: list[int],
    limits: WidthLimits = ANY,
) -> Sizes:
    """Return the sizes of all layers when at most ``ratio`` of the groups of ``layers`` is removed.

    The residual stream has one width: it is that of all layers.
    """
    sizes: Sizes = {}
    for kind in (kind for kind in kinds if kind != HIDDEN):
        sizes[kind] = [family_of[kind].count for family_of in families]
        for layer in layers:
            allowed = allowed_sizes(families[layer], kind, kinds, limits)
            sizes[kind][layer] = at_least(allowed, sizes[kind][layer] * (1 - ratio))
    if HIDDEN in kinds:
        first = families[0]
        groups = sizes[HEADS][0] if HEADS in sizes else first[HEADS].count
        allowed = hidden_sizes(first, groups, limits)
        sizes[HIDDEN] = [at_least(allowed, first[HIDDEN].count * (1 - ratio))] * len(families)
    return sizes


def sizes_named(
    families: list[dict[str, Coupled]], named: dict[str, int], limits: WidthLimits
) -> Sizes:
    """Return the sizes of all layers that have ``named`` groups: kind -> their number.

    Raises:
        SlimError: If the model has fewer, or the config cannot express the number.
    """
    first, kinds = families[0], tuple(named)
    groups = named.get(HEADS, first[HEADS].count)
    allowed = {kind: allowed_sizes(first, kind, kinds, limits) for kind in named}
    if HIDDEN in named:
        allowed[HIDDEN] = hidden_sizes(first, groups, limits)
        if limits.head_dim_is_derived and HEADS not in named:  # heads follow
            width = first[HEADS].width
            allowed[HIDDEN] = [n * width for n in allowed_sizes(first, HEADS, kinds, limits)]
            named = {**named, HEADS: named[HIDDEN] // width}
    for kind, sizes in allowed.items():
        _check_named(kind, named[kind], sizes, first[kind].count)
    return {kind: [number] * len(families) for kind, number in named.items()}


def _check_named(kind: str, number: int, allowed: list[int], present: int) -> None:
    if number not in allowed:
        nearest = sorted(sorted(allowed, key=lambda size: abs(size - number))[:2])
        raise SlimError(
            f"{SIZE_FLAGS[kind]} {number:,} is not possible: the model has {present:,}",
            f"the nearest that are: {', '.join(f'{size:,}' for size in nearest)}",
        )


def sizes_of_experts(
    mixture: Mixture,
    counts: Counts,
    *,
    ratio: float | None,
    target: int | None,
    named: int | None,
) -> Sizes:
    """Return the number of experts of each layer, by one of ``ratio``, ``target`` and ``named``.

    Raises:
        SlimError: If fewer than the router chooses would remain, or the number is not possible.
    """

    def sizes(number: int) -> Sizes:
        return {EXPERTS: [number if family else 0 for family in mixture.families]}

    allowed = mixture.sizes
    if named is not None:
        _check_named(EXPERTS, named, allowed, mixture.count)
        return sizes(named)
    if ratio is not None:
        return sizes(at_least(allowed, mixture.count * (1 - ratio)))
    assert target is not None
    for number in allowed:
        if counts.with_sizes(sizes(number)) <= target:
            return sizes(number)
    raise SlimError(
        f"{target:,} parameters cannot be reached: with {allowed[-1]} experts a layer there are "
        f"{counts.with_sizes(sizes(allowed[-1])):,}, and a token needs {mixture.per_token}",
        "set a larger target",
    )


def sizes_within(
    families: list[dict[str, Coupled]],
    target: int,
    kinds: tuple[str, ...],
    layers: list[int],
    counts: Counts,
    limits: WidthLimits = ANY,
) -> Sizes:
    """Return the largest sizes of at most ``target`` parameters, all kinds in proportion.

    Raises:
        SlimError: If even one group a layer is more.
    """
    guide = next(kind for kind in (MLP, HIDDEN, HEADS) if kind in kinds)
    first = families[layers[0]]
    allowed = allowed_sizes(first, guide, kinds, limits)
    sizes: Sizes = {}
    for stays in allowed:
        sizes = sizes_for(families, 1 - stays / first[guide].count, kinds, layers, limits)
        if counts.with_sizes(sizes) <= target:
            break
    else:
        sizes = sizes_for(families, 1.0, kinds, layers, limits)
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
                wider[MLP][layer] = at_least(allowed_sizes(families[layer], MLP, kinds), stays)
            if counts.with_sizes(wider) <= target:
                return wider
    return sizes


def retain(
    families: list[dict[str, Coupled]],
    scores: Scores,
    sizes: Sizes,
    layers: list[int],
    ranking: str,
    runs: int = 1,
) -> RetainedGroups:
    """Choose the groups that remain: those with the highest scores.

    Args:
        families: Of each layer.
        scores: Of every group.
        sizes: From ``sizes_for`` or ``sizes_within``.
        layers: Those that may shrink.
        ranking: ``layer`` retains exactly ``sizes``; ``global`` ranks the groups of all ``layers``
            in one list: as many are removed in total, those with the lowest scores.
        runs: Equal runs of groups, each of which retains as many.
    """
    retained: RetainedGroups = {}
    for kind, counts in sizes.items():
        if ranking == "global":
            counts = _spread(kind, families, scores, counts, layers)
        retained[kind] = []
        for layer, stays in enumerate(counts):
            if not stays:  # a layer without experts
                retained[kind].append(np.zeros(0, np.int64))
                continue
            by_run = scores[name_of(layer, kind)].reshape(runs, -1)
            order = np.argsort(-by_run, axis=1, kind="stable")[:, : stays // runs]
            order = order + by_run.shape[1] * np.arange(runs)[:, None]
            retained[kind].append(np.sort(order.reshape(-1)))
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
    steps = {layer: allowed_sizes(families[layer], kind, (kind,)) for layer in layers}
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
