"""Parameters of a model by layer and by group, counted from shapes alone.

Invariant: counts are exact and no weight is read: with C the numbers of a group,
parameters after = parameters before − Σ removed groups · C. For a llama block with d inputs,
a heads, k key-value heads of size h and f neurons, all groups in total are
2·d·a·h + 2·d·k·h + 3·d·f. A channel of the residual stream crosses every group, and what both
have in common is counted once. Try it: ``mlx-slim prune MODEL -o DIR --ratio 0.25 --dry-run``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_slim.models import structure
from mlx_slim.models.residual import residual
from mlx_slim.models.structure import HIDDEN


@dataclass(frozen=True)
class Counts:
    """Parameters of a dense model.

    Attributes:
        total: Of the whole model.
        blocks: Of each layer.
        groups: Kind -> parameters of one group, by layer.
        sizes: Kind -> groups of each layer.
        channel: Parameters of one channel of the residual stream, in the whole model.
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


def count(model: nn.Module) -> Counts:
    """Count ``model``, whose weights need not be there (``models.build.build``)."""
    leaves: dict[str, mx.array] = dict(tree_flatten(model.parameters()))  # pyright: ignore
    stream = residual(model).channels
    numbers = {path: leaves[path].size for path, _ in stream.members}
    prefix = structure.blocks_path(model)
    blocks, groups, sizes, crossing = [], {}, {HIDDEN: []}, {}
    for layer, block in enumerate(structure.blocks(model)):
        shapes = {path: value.shape for path, value in tree_flatten(block.parameters())}  # pyright: ignore
        blocks.append(sum(math.prod(shape) for shape in shapes.values()))
        sizes[HIDDEN].append(stream.count)
        for kind, family in structure.coupled(block).items():
            paths = [path for path, _ in family.members]
            size = sum(math.prod(shapes[path]) for path in paths)
            common = sum(numbers.get(f"{prefix}.{layer}.{path}", 0) for path in paths)
            groups.setdefault(kind, []).append(size // family.count)
            crossing.setdefault(kind, []).append(common // family.count // stream.count)
            sizes.setdefault(kind, []).append(family.count)
    return Counts(
        total=sum(value.size for value in leaves.values()),
        blocks=blocks,
        groups=groups,
        sizes=sizes,
        channel=sum(numbers.values()) // stream.count,
        crossing=crossing,
    )
