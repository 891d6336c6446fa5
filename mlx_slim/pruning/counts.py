"""Parameters of a model by layer and by group, counted from shapes alone.

Invariant: counts are exact and no weight is read: with C the numbers of a group,
parameters after = parameters before − Σ removed groups · C. For a llama block with d inputs,
a heads, k key-value heads of size h and f neurons, all groups in total are
2·d·a·h + 2·d·k·h + 3·d·f. A channel of the residual stream crosses every group, and what both
have in common is counted once. Try it: ``mlx-slim prune MODEL -o DIR --ratio 0.25 --dry-run``.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_slim.models import structure
from mlx_slim.models.kinds import HIDDEN
from mlx_slim.models.mixtures import Mixture
from mlx_slim.pruning.families import families_of


@dataclass(frozen=True)
class Counts:
    """Parameters of a model.

    Attributes:
        total: Of the whole model.
        blocks: Of each layer.
        groups: Kind -> parameters of one group, by layer.
        sizes: Kind -> groups of each layer.
        channel: Parameters of one channel of the residual stream, in the whole model; 0 of a
            mixture, whose channels are not pruned.
        crossing: Kind -> parameters that one group and one channel have in common, by layer.
    """

    total: int
    blocks: list[int]
    groups: dict[str, list[int]]
    sizes: dict[str, list[int]]
    channel: int
    crossing: dict[str, list[int]]

    def without_layers(self, layers: list[int]) -> int:
        """Return the parameters of the model without ``layers``."""
        return self.total - sum(self.blocks[i] for i in layers)

    def with_sizes(self, sizes: dict[str, list[int]]) -> int:
        """Return the parameters of the model with ``sizes``: kind -> groups of each layer."""
        total, channel = self.total, self.channel
        for kind, after in sizes.items():
            if kind == HIDDEN:
                continue
            layers = zip(
                self.sizes[kind], after, self.groups[kind], self.crossing[kind], strict=True
            )
            for before, stays, cost, common in layers:
                total -= (before - stays) * cost
                channel -= (before - stays) * common
        if HIDDEN in sizes:
            total -= (self.sizes[HIDDEN][0] - sizes[HIDDEN][0]) * channel
        return total


def count(model: nn.Module, mixture: Mixture | None = None) -> Counts:
    """Count ``model``, whose weights need not be there (``models.build.build``)."""
    leaves: dict[str, mx.array] = dict(tree_flatten(model.parameters()))  # pyright: ignore
    families = families_of(model, mixture)
    prefix = structure.blocks_path(model)
    stream = families[0].get(HIDDEN)
    numbers = {path: leaves[path].size for path, _ in stream.members} if stream else {}
    width = stream.count if stream else 1
    blocks = [0] * len(families)
    for path, value in leaves.items():
        if path.startswith(f"{prefix}."):
            blocks[int(path[len(prefix) + 1 :].partition(".")[0])] += value.size
    kinds = dict.fromkeys(kind for of_block in families for kind in of_block)
    groups: dict[str, list[int]] = {kind: [] for kind in kinds}
    sizes: dict[str, list[int]] = {kind: [] for kind in kinds}
    crossing: dict[str, list[int]] = {kind: [] for kind in kinds}
    for layer, of_block in enumerate(families):
        for kind in kinds:
            family = of_block.get(kind)
            sizes[kind].append(family.count if family else 0)
            paths = [f"{prefix}.{layer}.{path}" for path, _ in family.members] if family else []
            if kind == HIDDEN or family is None:
                paths = []
            per_group = max(sizes[kind][-1], 1)
            groups[kind].append(sum(leaves[path].size for path in paths) // per_group)
            crossing[kind].append(sum(numbers.get(p, 0) for p in paths) // per_group // width)
    return Counts(
        total=sum(value.size for value in leaves.values()),
        blocks=blocks,
        groups=groups,
        sizes=sizes,
        channel=sum(numbers.values()) // width,
        crossing=crossing,
    )
