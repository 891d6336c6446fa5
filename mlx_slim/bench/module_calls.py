"""What the modules of a model's blocks are called with in a step, and each of them alone again.

Invariant: a recorded model computes what it computed before, and ``close`` gives every module its
class back. Used by ``bench/profile.py``. Legend: M rows of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_slim.adapters.lora import Adapter
from mlx_slim.data.batches import Batch
from mlx_slim.models import structure

Compute = Callable[[], list[mx.array]]


@dataclass
class ModuleCall:
    """A module on arrays of one shape.

    Attributes:
        path: Of the module inside its block; empty for the block.
        module: It, or one like it.
        arguments: What it got.
        keywords: The same by name.
        batch: The batch that was computed.
        calls: How often.
    """

    path: str
    module: nn.Module
    arguments: tuple[Any, ...]
    keywords: Mapping[str, object]
    batch: Batch
    calls: int = 0

    @property
    def rows(self) -> int:
        """M, the positions of its input."""
        return self.arguments[0].size // self.arguments[0].shape[-1]

    def compute(self, module: nn.Module) -> Compute:
        """Return what builds the call of ``module`` and its gradients."""
        hidden, *rest = self.arguments
        function = cast(Callable[..., Any], module)
        return vector_jacobian(lambda x: function(x, *rest, **self.keywords), [hidden], module)


@dataclass
class Recorder:
    """Notes what the modules of the blocks are called with, in place; ``close`` undoes it.

    Args:
        model: Its blocks are watched.
    """

    model: nn.Module
    calls: dict[tuple, ModuleCall] = field(default_factory=dict)
    batch: Batch | None = None

    def __post_init__(self) -> None:
        self._classes: list[tuple[nn.Module, type]] = []
        for block in structure.blocks(self.model):
            self._watch(block, "")

    def _watch(self, module: nn.Module, path: str) -> None:
        kind, recorder = type(module), self

        def call(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
            recorder.note(path, self, arguments, keywords)
            return cast(Any, kind).__call__(self, *arguments, **keywords)

        self._classes.append((module, kind))
        for name, child in components_of(module):
            self._watch(child, f"{path}.{name}" if path else name)
        module.__class__ = type(kind.__name__, (kind,), {"__call__": call})

    def note(
        self,
        path: str,
        module: nn.Module,
        arguments: tuple[Any, ...],
        keywords: Mapping[str, object],
    ) -> None:
        """Count a call; keep what the first of its shape got."""
        batch = self.batch
        assert batch is not None
        mx.eval(arguments, keywords)
        weights = cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))
        inputs = [a.shape for a in (*arguments, *keywords.values()) if isinstance(a, mx.array)]
        shapes = tuple((name, value.shape) for name, value in weights)
        # Shared beginnings make the attention of each list another one.
        sharing = id(batch) if batch.nodes is not None else 0
        key = (path, tuple(inputs), shapes, sharing)
        if key not in self.calls:
            self.calls[key] = ModuleCall(path, module, arguments, keywords, batch)
        self.calls[key].calls += 1

    def close(self) -> None:
        """Give the modules their classes back."""
        for module, kind in reversed(self._classes):  # a shared module was watched twice
            module.__class__ = kind


def components_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return name and module of what ``module`` consists of; a linear layer is one component."""
    if structure.is_linear(module) or isinstance(module, Adapter):
        return []
    named: list[tuple[str, nn.Module]] = []
    for name, child in module.children().items():
        modules = child if isinstance(child, list) else [child]
        named += [(name, one) for one in modules if isinstance(one, nn.Module)]
    return named


def vector_jacobian(
    function: Callable[..., Any], inputs: Sequence[mx.array], module: nn.Module
) -> Compute:
    """Return what builds outputs and gradients of ``function``, by its inputs and the module's.

    Args:
        function: Of the inputs.
        inputs: Differentiated where they are floats.
        module: Its trainable parameters are differentiated too.
    """
    named = cast(list[tuple[str, mx.array]], tree_flatten(module.trainable_parameters()))
    paths = [path for path, _ in named]
    count = len(inputs)

    def outputs(*primals: mx.array) -> list[mx.array]:
        module.update(tree_unflatten(list(zip(paths, primals[count:], strict=True))))
        flat = tree_flatten(function(*primals[:count]))
        return [value for _, value in flat if isinstance(value, mx.array)]

    def compute() -> list[mx.array]:
        parameters = [value for _, value in named]
        primals = [*inputs, *parameters]
        shapes = outputs(*primals)
        try:
            results, gradients = mx.vjp(outputs, primals, [mx.ones_like(one) for one in shapes])
        finally:
            module.update(tree_unflatten(list(zip(paths, parameters, strict=True))))
        return [*results, *gradients]

    return compute
