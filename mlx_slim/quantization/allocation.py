"""Bits for each layer under a budget of bytes: the closed forms and the choice.

Invariant: nothing is read but shapes and a table of losses; sizes are those of the tensors that
will be stored, to the byte. The loss of a mix is modelled as the sum over layers. Try it:
``mlx-slim quantize MODEL -o DIR --bits-per-weight 4.5 --sensitivity rules``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlx_slim.models.quantized import LayerFormat

_ENTRY = len('"":{"data_offsets":[,],"dtype":"BF16","shape":[]},')  # of a safetensors header
_FILE = 8 + len('{"__metadata__":{"format":"mlx"}}') + 8  # length, metadata, alignment
SHARD_BYTES = 5 << 30  # mlx-lm starts another file above it


@dataclass(frozen=True)
class StoredAs:
    """One way to store a layer.

    Attributes:
        format: None leaves it dense.
        nbytes: Of its tensors that depend on the format.
        loss: What it costs, in any unit that adds up over layers; ``quantize`` uses nats a token.
    """

    format: LayerFormat | None
    nbytes: int
    loss: float


def layer_bytes(shape: Sequence[int], chosen: LayerFormat | None, itemsize: int) -> int:
    """Return the bytes of a weight (..., O, I) as it is stored.

    Affine: numbers · bits / 8 of codes, and a scale and a bias for each group; dense: numbers ·
    itemsize.

    Args:
        shape: Of the dense weight.
        chosen: An affine format whose group size divides I; None is dense.
        itemsize: Bytes of a stored float.
    """
    numbers = math.prod(shape)
    if chosen is None:
        return numbers * itemsize
    return numbers * chosen.bits // 8 + 2 * itemsize * (numbers // chosen.group_size)


def overhead_bytes(names: Sequence[str], tensor_bytes: int) -> int:
    """Return the most bytes that safetensors files take besides the tensors: their headers.

    Args:
        names: Of all tensors.
        tensor_bytes: Of all tensors.
    """
    digits = 2 * len(str(tensor_bytes)) + 3 * 12  # two offsets; three sizes with commas
    files = 1 + 2 * tensor_bytes // SHARD_BYTES  # a file is at least half full, or followed by one
    return files * _FILE + sum(_ENTRY + digits + len(name.encode()) for name in names)


def hull(choices: Sequence[StoredAs]) -> list[StoredAs]:
    """Return the lower convex hull of (bytes, loss), from the smallest to the least loss.

    Dominated choices are dropped; along the hull each byte saves less loss than the one before.
    """
    corners: list[StoredAs] = []
    for choice in sorted(choices, key=lambda one: (one.nbytes, one.loss)):
        if corners and choice.loss >= corners[-1].loss:
            continue
        while len(corners) > 1 and _saving(corners[-2], choice) > _saving(*corners[-2:]):
            corners.pop()
        corners.append(choice)
    return corners


def _saving(smaller: StoredAs, larger: StoredAs) -> float:
    """Return the loss saved for each byte more."""
    return (smaller.loss - larger.loss) / (larger.nbytes - smaller.nbytes)


def allocate(choices: Mapping[str, Sequence[StoredAs]], budget: int) -> dict[str, StoredAs]:
    """Choose for every layer, so that the bytes are within ``budget`` and the losses add up to few.

    Every layer starts at its smallest choice; steps along the hulls are taken by loss saved for a
    byte. A step that does not fit is skipped, and that layer's later ones with it. Σ loss is above
    the optimum by at most the gain of the first step that did not fit, and does not rise with the
    budget.

    Two layers of 1, 2 or 3 bytes with losses (8, 4, 3) and (6, 3, 0): steps of a byte save 4 and 1
    in the first, 3 and 3 in the second. A budget of 5 begins with 1 + 1 bytes and takes 4, 3 and 3:
    the first layer has 2 bytes, the second 3, and Σ loss is 4.

    Args:
        choices: Layer -> its choices, at least one each.
        budget: Bytes of all layers.

    Raises:
        ValueError: If the smallest choices take more than ``budget``.
    """
    hulls = {layer: hull(options) for layer, options in choices.items()}
    taken = dict.fromkeys(hulls, 0)
    left = budget - sum(corners[0].nbytes for corners in hulls.values())
    if left < 0:
        raise ValueError(f"the smallest choices are {-left} bytes over the budget of {budget}")
    steps = [
        (_saving(*corners[number : number + 2]), layer, number)
        for layer, corners in hulls.items()
        for number in range(len(corners) - 1)
    ]
    skipped: set[str] = set()
    # Stable: of equal slopes a layer's earlier step comes first, and the earlier layer.
    for _, layer, number in sorted(steps, key=lambda step: -step[0]):
        corners = hulls[layer]
        needed = corners[number + 1].nbytes - corners[number].nbytes
        if layer in skipped or needed > left:
            skipped.add(layer)
            continue
        taken[layer] = number + 1
        left -= needed
    return {layer: corners[taken[layer]] for layer, corners in hulls.items()}
