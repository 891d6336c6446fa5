"""The modules of the models that the shipped recipes name, so that a plan imports no mlx-lm.

Invariant: ``shipped_shapes.json`` holds what the installed mlx-lm builds from each config of
``shipped_models.py`` (layers, shapes, attention), which a test builds too; a model that is not in
the table is built by its class. Try it: ``mlx-slim plan mistral-qlora``. The table is written by
``python -m mlx_slim.planner.skeleton``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_slim.artifacts import write_text
from mlx_slim.models import build as classes
from mlx_slim.models.attention import Attention, attention_of
from mlx_slim.models.structure import blocks, blocks_path
from mlx_slim.planner.shipped_models import SHIPPED_CONFIGS
from mlx_slim.reading import JsonObject, ModelConfig

TABLE = Path(__file__).with_name("shipped_shapes.json")
# Layers that the table may hold: classes of mlx.nn, and how a small one is made.
_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(1, 1),
    "Embedding": lambda: nn.Embedding(1, 1),
    "RMSNorm": lambda: nn.RMSNorm(1),
    "LayerNorm": lambda: nn.LayerNorm(1),
}


class Skeleton(nn.Module):
    """The modules of a model, by the names that its class gives them; it computes nothing.

    Args:
        blocks_path: Of the list of blocks.
    """

    def __init__(self, blocks_path: str) -> None:
        super().__init__()
        self.blocks_path = blocks_path

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks, first to last."""
        owner: Any = self
        for name in self.blocks_path.split("."):
            owner = owner[name]
        return owner


def modules_of(config: ModelConfig) -> tuple[nn.Module, list[Attention]]:
    """Return the model of ``config`` without weights, and how each block attends.

    The model is a ``Skeleton`` where the table has the config, else an object of mlx-lm's class;
    its parameters are not evaluated.

    Raises:
        SlimError: If mlx-lm does not know the model type, or the config does not fit it.
    """
    name = next((name for name, shipped in SHIPPED_CONFIGS.items() if shipped == config), None)
    if name is None:
        model = classes.build(config)
        return model, attention_of(model) or [Attention()] * len(blocks(model))
    record = _table()[name]
    model = Skeleton(record["blocks"])
    with classes.preserved_random_state():
        _fill(model, record["modules"])
        owner: Any = model
        *path, last = record["blocks"].split(".")
        for part in path:
            owner = owner[part]
        owner[last] = [_fill(nn.Module(), record["block"]) for _ in range(record["count"])]
    return model, [Attention(**record["attention"])] * record["count"]


@functools.cache
def _table() -> JsonObject:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def _fill(owner: nn.Module, children: JsonObject) -> nn.Module:
    """Add modules to ``owner``: an object is a module with children, a list a layer's shapes."""
    for name, child in children.items():
        if isinstance(child, dict):
            owner[name] = _fill(nn.Module(), child)
        elif child:
            kind, *shapes = child
            owner[name] = _layer(kind, *shapes)
        else:
            owner[name] = []  # the blocks, in their place among the modules
    return owner


def _layer(kind: str, weight: list[int], bias: list[int] | None = None) -> nn.Module:
    layer = _LAYERS[kind]()
    layer["weight"] = mx.zeros(weight)
    if bias is not None:
        layer["bias"] = mx.zeros(bias)
    else:
        layer.pop("bias", None)
    return layer


def record_of(config: ModelConfig) -> JsonObject:
    """Return the entry of the table for ``config``, from the class of the installed mlx-lm.

    Raises:
        ValueError: If its blocks differ, or it has parameters that a table cannot hold.
    """
    model = classes.build(config)
    layers, path = blocks(model), blocks_path(model)
    attention = attention_of(model) or [Attention()] * len(layers)
    within = [_children(block, ()) for block in layers]
    if any(one != within[0] for one in within) or len(set(attention)) != 1:
        raise ValueError("the blocks of this model differ: the table holds one of them")
    return {
        "blocks": path,
        "count": len(layers),
        "attention": asdict(attention[0]),
        "modules": _children(model, layers),
        "block": within[0],
    }


def _children(module: nn.Module, layers: Any) -> JsonObject:
    result: JsonObject = {}
    for name, child in module.items():
        # A class that can be pipelined returns its layers as a copy of the list.
        if isinstance(child, list) and child and [*map(id, child)] == [*map(id, layers)]:
            result[name] = []
        elif isinstance(child, nn.Module) and child.parameters():
            result[name] = _child(child, layers)
        elif any(isinstance(one, (mx.array, nn.Module)) for _, one in tree_flatten([child])):
            raise ValueError(f"{name} of {type(module).__name__} is no layer of the table")
    return result


def _child(child: nn.Module, layers: Any) -> JsonObject | list[Any]:
    kind = type(child).__name__
    if getattr(nn, kind, None) is not type(child) or kind not in _LAYERS:
        return _children(child, layers)
    shapes = [list(child["weight"].shape)]
    return [kind, *shapes, *([list(child["bias"].shape)] if "bias" in child else [])]


def main() -> None:
    """Write the table from the installed mlx-lm."""
    lines = [
        f" {json.dumps(name)}: {json.dumps(record_of(config))}"
        for name, config in SHIPPED_CONFIGS.items()
    ]
    write_text(TABLE, "{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
