"""Mixtures of experts: the tensors that hold the experts, and what a router sends to them.

Invariant: nothing is read by name: an expert is in the tensors whose shape follows the config's
number of experts (its weights, the row of the router, its bias and correction). Removing it from
all of them equals a router logit of −∞. Try it: ``mlx-slim prune MODEL -o DIR --method reap``.

Shapes: B rows, T positions, K experts of a token, D width, E experts.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_slim.models import structure
from mlx_slim.models.build import build
from mlx_slim.models.kinds import EXPERTS
from mlx_slim.models.normalize import model_module
from mlx_slim.models.structure import Coupled
from mlx_slim.reading import ModelConfig

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token")
_PER_TOKEN += ("moe_k", "moe_topk", "moe_top_k")


@dataclass(frozen=True)
class Mixture:
    """The experts of a model.

    Attributes:
        keys: Of the config, that say their number.
        count: Experts of a layer, E.
        per_token: Experts that read a token, K.
        groups: Equal runs of experts that the router chooses among first; 1 without.
        chosen_groups: Groups whose experts may read a token.
        families: Of each block, its experts as coupled groups; ``output`` is the path of the module
            that holds router and experts. None where the block has none.
    """

    keys: tuple[str, ...]
    count: int
    per_token: int
    groups: int
    chosen_groups: int
    families: list[Coupled | None]

    @property
    def sizes(self) -> list[int]:
        """Numbers of experts that may remain, descending; the present one first.

        Groups stay of equal size, with two experts at least: routers rank them by their best two.
        """
        least = -(-self.per_token // self.chosen_groups) if self.groups > 1 else self.per_token
        least = max(least, 2 if self.groups > 1 else 1)
        each = range(self.count // self.groups, least - 1, -1)
        return [size * self.groups for size in each] or [self.count]


def mixture_of(config: ModelConfig) -> Mixture | None:
    """Return the experts of the model of ``config``.

    None of a dense model, and where the experts are not what is described above.
    """
    part = config.get("text_config", config)
    fields = dataclasses.fields(model_module(config).ModelArgs)
    defaults = {f.name: f.default for f in fields if type(f.default) is int}
    values = {**defaults, **part}
    keys = tuple(key for key in _COUNTS if type(values.get(key)) is int and values[key] > 1)
    if not keys:
        return None
    count, groups = values[keys[0]], values.get("n_group") or 1
    more = copy.deepcopy(config)
    more.get("text_config", more).update(dict.fromkeys(keys, count + groups))
    families: list[Coupled | None] = []
    for block, other in zip(
        structure.blocks(build(config)), structure.blocks(build(more)), strict=True
    ):
        shapes: dict[str, mx.array] = dict(tree_flatten(block.parameters()))  # pyright: ignore
        larger: dict[str, mx.array] = dict(tree_flatten(other.parameters()))  # pyright: ignore
        members = tuple(
            (path, axis)
            for path, value in shapes.items()
            for axis in range(value.ndim)
            if value.shape[axis] != larger[path].shape[axis]
        )
        holders = [path for path, module in block.named_modules() if _switches(module)]
        if members and (
            len(holders) != 1 or any(shapes[path].shape[axis] != count for path, axis in members)
        ):
            return None
        families.append(Coupled(EXPERTS, count, 1, 1, members, holders[0]) if members else None)
    if not any(families):
        return None
    return Mixture(
        keys=keys,
        count=count,
        per_token=next((values[key] for key in _PER_TOKEN if values.get(key)), count),
        groups=groups,
        chosen_groups=values.get("topk_group") or groups,
        families=families,
    )


def _switches(module: Any) -> list[str]:
    """Return the names of the children of ``module`` that apply experts to routed tokens."""
    from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

    return [n for n, child in module.items() if isinstance(child, (SwitchGLU, SwitchMLP))]


# Gets, all (..., K): indices of the experts, weights of the router, L2 of the outputs, float32.
Report = Callable[[mx.array, mx.array, mx.array], None]


class _Answer(nn.Module):
    """Takes the place of the experts of a layer; gives ``answer`` of what they would read."""

    def __init__(self, answer: Callable[..., mx.array]) -> None:
        super().__init__()
        self._answer = answer

    def __call__(self, x: mx.array, indices: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return self._answer(x, indices, *args, **kwargs)


class RouterProbe(nn.Module):
    """A layer of experts that reports, of each token, its experts, their weights and outputs.

    The layer's output is Σ_k w_k · y_k, and what shared experts add. Its derivative by the first
    channel of y_k is the weight w_k that the model applies, whatever normalises or scales it.
    """

    def __init__(self, holder: nn.Module, report: Report) -> None:
        super().__init__()
        self._holder, self._report = holder, report

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """Return the layer's output, after reporting."""
        holder: Any = self._holder
        (name,) = _switches(holder)
        experts = holder[name]
        seen: list[tuple[mx.array, mx.array]] = []

        def observed(x: mx.array, indices: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            outputs = experts(x, indices, *args, **kwargs)
            seen.append((indices, outputs))
            return outputs

        def through(outputs: mx.array) -> mx.array:
            holder[name] = _Answer(lambda *_, **__: outputs)
            return holder(x, *args, **kwargs)

        try:
            holder[name] = _Answer(observed)
            out = holder(x, *args, **kwargs)
            ((indices, outputs),) = seen
            first = mx.zeros_like(out)
            first[..., 0] = 1
            _, (gradient,) = mx.vjp(through, [outputs], [first])
        finally:
            holder[name] = experts
        norms = mx.linalg.norm(outputs.astype(mx.float32), axis=-1)
        self._report(indices, gradient[..., 0].astype(mx.float32), norms)
        return out
