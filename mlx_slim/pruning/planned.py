"""What ``plan`` returns: a pruning that is possible, counted, and how it reads.

Invariant: it says sizes, not groups: these are chosen by measuring. Try it:
``mlx-slim prune MODEL -o DIR --ratio 0.2 --dry-run``.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_slim.models.kinds import HIDDEN
from mlx_slim.pruning.counts import Counts
from mlx_slim.pruning.records import GROUPS
from mlx_slim.pruning.width import Sizes


@dataclass(frozen=True)
class Plan:
    """A pruning that is possible.

    Attributes:
        axis: ``depth`` or ``width``.
        method: Resolved; ``named`` for layers given by number.
        layers: Layers that may be removed or narrowed.
        removed: Layers to remove, where the options name them.
        count: Number of layers to remove.
        kinds: Kinds of groups to remove.
        sizes: Remaining groups, by kind and layer.
        before: Counts of the source.
        parameters: Remaining parameters.
        rows: Calibration rows and their tokens; (0, 0) if the method needs none.
        notes: For the user, a line each.
    """

    axis: str
    method: str
    layers: list[int]
    removed: list[int]
    count: int
    kinds: tuple[str, ...]
    sizes: Sizes
    before: Counts
    parameters: int
    rows: tuple[int, int]
    notes: list[str]

    def lines(self) -> list[str]:
        """Return a summary, a fact a line."""
        total = len(self.before.blocks)
        what = (
            f"{self.count} of {total} layers"
            if self.axis == "depth"
            else f"{', '.join(self.kinds)} of {len(self.layers)} of {total} layers"
        )
        lines = [f"removes    {what}: {self.method}"]
        for kind, sizes in self.sizes.items():
            first = self.layers[0]
            where = "in all layers" if kind == HIDDEN else "a layer"
            lines.append(
                f"{GROUPS[kind]:<10} {self.before.sizes[kind][first]:,} -> {sizes[first]:,} {where}"
            )
        before, after = self.before.total, self.parameters
        lines.append(f"parameters {before:,} -> {after:,} ({after / before:.1%} remain)")
        return lines + [f"note       {note}" for note in self.notes]
