"""The residual stream of a dense model: which tensors hold its channels, and the norms over them.

Invariant: nothing is read by name: the channels are the inner side of every coupled layer of a
block, the vectors of its norms, the embedding, the last norm and the head. Removing a channel from
all of them equals zeroing it in all of them once ``corrected`` rescaled the RMS norms, which divide
by the number of channels. Try it: ``mlx-slim prune MODEL -o DIR --hidden-size 512``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_slim.models import structure
from mlx_slim.models.kinds import HIDDEN
from mlx_slim.models.structure import Coupled


@dataclass(frozen=True)
class Residual:
    """The residual stream of a model.

    Attributes:
        channels: The channels as coupled groups; paths of ``members`` begin at the model.
        readers: Of each block, the paths inside it of the layers whose inputs are its norms'
            outputs, one a family of coupled groups.
        norms: Path of the weight of each RMS norm -> offset of that weight.
        last_norm: Path of the weight of the norm before the head.
        embedding: Path of the embedding's weight.
        scaled: Whether the embeddings are multiplied by √width (Gemma 3).
        tied: Whether the embedding is the head.
    """

    channels: Coupled
    readers: list[list[str]]
    norms: dict[str, float]
    last_norm: str
    embedding: str
    scaled: bool
    tied: bool


def residual(model: nn.Module) -> Residual:
    """Return the residual stream of a dense ``model``, whose weights need not be there."""
    from mlx_lm.models import gemma3_text

    # Norm class -> what it adds to its weight before it multiplies. None: no correction, because
    # nothing but mean and variance depends on the number of channels.
    offsets = {nn.RMSNorm: 0.0, gemma3_text.RMSNorm: 1.0, nn.LayerNorm: None}
    modules = dict(model.named_modules())
    prefix = structure.blocks_path(model)
    owner = prefix.rpartition(".")[0]
    body = modules[owner]
    members: list[tuple[str, int]] = []
    readers: list[list[str]] = []
    norms: dict[str, float] = {}

    def add_norms(path: str, module: nn.Module) -> list[str]:
        names = [name for name, child in module.items() if type(child) in offsets]
        for name in names:
            leaves: list[tuple[str, mx.array]] = tree_flatten(module[name].parameters())  # pyright: ignore
            members.extend((f"{path}.{name}.{leaf}", 0) for leaf, _ in leaves)
            offset = offsets[type(module[name])]
            if offset is not None:
                norms[f"{path}.{name}.weight"] = offset
        return [f"{path}.{name}.weight" for name in names]

    for index, block in enumerate(structure.blocks(model)):
        path = f"{prefix}.{index}"
        shapes: dict[str, mx.array] = dict(tree_flatten(block.parameters()))  # pyright: ignore
        readers.append([])
        for family in structure.coupled(block).values():
            for member, axis in family.members:
                if shapes[member].ndim == 2:
                    members.append((f"{path}.{member}", 1 - axis))
            if f"{family.output}.bias" in shapes:
                members.append((f"{path}.{family.output}.bias", 0))
            readers[-1].append(family.members[0][0].rpartition(".")[0])
        add_norms(path, block)
    (embedding,) = [name for name, child in body.items() if isinstance(child, nn.Embedding)]
    members.append((f"{owner}.{embedding}.weight", 1))
    (last_norm,) = add_norms(owner, body)
    heads = [
        path
        for path, module in modules.items()
        if isinstance(module, nn.Linear) and not path.startswith(f"{prefix}.")
    ]
    members += [(f"{path}.weight", 1) for path in heads]
    width = body[embedding].weight.shape[1]
    return Residual(
        channels=Coupled(HIDDEN, width, 1, 1, tuple(members), ""),
        readers=readers,
        norms=norms,
        last_norm=last_norm,
        embedding=f"{owner}.{embedding}.weight",
        scaled=isinstance(body, gemma3_text.Gemma3Model),
        tied=not heads,
    )


def corrected(stream: Residual, width: int) -> dict[str, Callable[[mx.array], mx.array]]:
    """Return what to do to tensors of a model with ``width`` of its channels, by path.

    An RMS norm divides by √(Σx²/D): with D′ channels left, the others zero, the same quotient is
    √(D/D′) times too small, so its multiplier w (Gemma 3: 1 + w) grows by that. Example: x = (3, 4)
    of four channels has norm √(25/4) = 2.5 there, √(25/2) = 3.54 = √2 · 2.5 alone. The ε inside
    the root then counts D/D′ times as much, which is left so: the norms of queries and keys have
    the same ε. Gemma 3 multiplies embeddings by √D rounded to bfloat16; the embedding takes the
    ratio of both roots, and where it is the head too, the last norm takes it back.

    Args:
        stream: Of the model with all channels.
        width: Channels that remain, D′.
    """
    ratio = math.sqrt(stream.channels.count / width)
    scale = _root(stream.channels.count) / _root(width) if stream.scaled else 1.0
    changes: dict[str, Callable[[mx.array], mx.array]] = {}
    for path, offset in stream.norms.items():
        undone = scale if stream.tied and path == stream.last_norm else 1.0
        changes[path] = _multiplied(ratio / undone, offset)
    if scale != 1.0:
        changes[stream.embedding] = _multiplied(scale, 0.0)
    return changes


def _root(width: int) -> float:
    """Return √``width`` as mlx-lm's Gemma 3 rounds it."""
    return float(mx.array(math.sqrt(width), mx.bfloat16).astype(mx.float32).item())  # pyright: ignore


def _multiplied(factor: float, offset: float) -> Callable[[mx.array], mx.array]:
    def change(weight: mx.array) -> mx.array:
        exact = (weight.astype(mx.float32) + offset) * factor - offset
        return exact.astype(weight.dtype)

    return change
