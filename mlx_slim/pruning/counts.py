"""Parameters of a model by layer and by group, counted from shapes alone.

Invariant: counts are exact and no weight is read: with C the numbers of a group,
parameters after = parameters before − Σ removed groups · C. For a llama block with d inputs,
a heads, k key-value heads of size h and f neurons, all groups in total are
2·d·a·h + 2·d·k·h + 3·d·f. Try it: ``mlx-slim prune MODEL -o DIR --ratio 0.25 --dry-run``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_slim.models import structure


@dataclass(frozen=True)
class Counts:
    """Parameters of a dense model.

    Attributes:
        total: Of the whole model.
        blocks: Of each layer.
        groups: Kind -> parameters of one group, by layer.
        sizes: Kind -> groups of each layer.
    """

    total: int
    blocks: list[int]
    groups: dict[str, list[int]]
    sizes: dict[str, list[int]]

    def without_layers(self, layers: list[int]) -> int:
        """Return the parameters of the model without ``layers``."""
        return self.total - sum(self.blocks[i] for i in layers)

    def with_sizes(self, sizes: dict[str, list[int]]) -> int:
        """Return the parameters of the model with ``sizes``: kind -> groups of each layer."""
        total = self.total
        for kind, after in sizes.items():
            before, cost = self.sizes[kind], self.groups[kind]
            total -= sum((b - w) * c for b, w, c in zip(before, after, cost, strict=True))
        return total


def count(model: nn.Module) -> Counts:
    """Count ``model``, whose weights need not be there (``models.build.build``)."""
    blocks, groups, sizes = [], {}, {}
    for block in structure.blocks(model):
        shapes = {path: value.shape for path, value in tree_flatten(block.parameters())}  # pyright: ignore
        blocks.append(sum(math.prod(shape) for shape in shapes.values()))
        for kind, family in structure.coupled(block).items():
            numbers = sum(math.prod(shapes[path]) for path, _ in family.members)
            groups.setdefault(kind, []).append(numbers // family.count)
            sizes.setdefault(kind, []).append(family.count)
    total = sum(value.size for _, value in tree_flatten(model.parameters()))  # pyright: ignore
    return Counts(total, blocks, groups, sizes)
