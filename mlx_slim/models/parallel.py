"""A model over several ranks: each has a share of its heads and neurons, or some of its blocks.

``divide`` calls ``shard`` (tensor parallelism, arXiv 1909.08053) or ``pipeline`` of mlx-lm's class
on a model whose weights are not read yet; reading them afterwards keeps a rank's part only.
Invariant: all ranks call the divided model alike, and get the same logits up to the order of sums;
what is decided by a machine's own numbers (``largest``) is agreed on. Try it:
``mlx.launch -n 2 --backend ring -- mlx-slim generate MODEL --parallel tensor --prompt Hello``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.agreement import gather
from mlx_slim.errors import SlimError
from mlx_slim.models import structure
from mlx_slim.runtime import world

Split = Literal["tensor", "pipeline"]
_MARK = "divided_by"


def divided_by(model: Any) -> Split | None:
    """Return how ``model`` is divided over the ranks; None where each has all of it."""
    return getattr(model, _MARK, None)


def largest(model: Any, number: int) -> int:
    """Return ``number``, or the largest of all ranks where ``model`` is divided."""
    return number if divided_by(model) is None else max(gather(number))


def can_split(model: nn.Module, how: Split) -> bool:
    """Return whether the class of ``model`` knows this way to divide it."""
    if how == "tensor":
        return hasattr(model, "shard")
    return hasattr(getattr(model, "model", None), "pipeline")


def why_not(model: nn.Module, how: Split, ranks: int) -> SlimError | None:
    """Return why ``model`` cannot be divided so over that many ranks; None if it can be.

    Args:
        model: Whole; its weights may be unread.
        how: By heads and neurons, or by blocks.
        ranks: How many.
    """
    refusal = _problem(model, how, ranks)
    if refusal is None:
        return None
    message, hint = refusal
    other: Split = "pipeline" if how == "tensor" else "tensor"
    if _problem(model, other, ranks) is None:
        hint = f"{hint}; or try --parallel {other}" if hint else f"try --parallel {other}"
    return SlimError(message, hint or "each rank needs the whole model: start one rank")


def _problem(model: nn.Module, how: Split, ranks: int) -> tuple[str, str] | None:
    """Return what is wrong with dividing ``model`` so, and which number of ranks would do."""
    if not can_split(model, how):
        return f"mlx-lm's {type(model).__module__.rpartition('.')[2]} has no {how} parallelism", ""
    if how == "pipeline":
        blocks = len(structure.blocks(model))
        short = f"{ranks} ranks cannot divide {blocks} blocks"
        return (short, f"start {blocks} at most") if ranks > blocks else None
    sizes = _sizes(structure.blocks(model)[0])
    odd = [f"{count:,} {name}" for name, count in sizes.items() if count % ranks]
    if not odd:
        return None
    counts = ", ".join(map(str, rank_counts(model)))
    hint = f"ranks that divide it: {counts}" if counts else "no number of ranks divides it"
    return f"{ranks} ranks do not divide the {', '.join(odd)} of this model", hint


def rank_counts(model: nn.Module) -> list[int]:
    """Return the numbers of ranks, 2 or more, that divide a block's heads and columns.

    Args:
        model: Whole; its weights may be unread.
    """
    sizes = _sizes(structure.blocks(model)[0]).values()
    return [n for n in range(2, max(sizes, default=0) + 1) if not any(s % n for s in sizes)]


def _sizes(block: nn.Module) -> dict[str, int]:
    """Return what ranks must divide, by name."""
    heads, pairs = structure.head_counts(block)
    sizes = {"heads": heads, "key-value heads": pairs} if heads else {}
    for path, module in block.named_modules():
        if (name := path.rpartition(".")[2]) in structure.READERS and "weight" in module:
            groups = "scales" in module
            columns = module["scales" if groups else "weight"].shape[-1]
            sizes[f"{'quantization groups' if groups else 'columns'} of {name}"] = columns
    return sizes


def divide(model: nn.Module, how: Split) -> None:
    """Leave ``model`` with this rank's part of it, in place, unread.

    Raises:
        SlimError: If the ranks cannot divide it so.
    """
    group = world()
    if refusal := why_not(model, how, group.size()):
        raise refusal
    try:
        if how == "tensor":
            cast(Any, model).shard(group)
        else:
            cast(Any, model).model.pipeline(group)
            _evaluate_each_pass(cast(Any, model).model)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        kind = type(model).__module__.rpartition(".")[2]
        raise SlimError(
            f"{group.size()} ranks do not divide this {kind}: {' '.join(str(error).split())[:160]}",
            "start another number of ranks, or one",
        ) from error
    object.__setattr__(model, _MARK, how)


def _evaluate_each_pass(body: nn.Module) -> None:
    """Let ``body`` (a stage of a pipeline) compute each pass at once.

    What one stage sends to the next has no name: two passes in one graph could be sent in one order
    and received in another.
    """
    kind: Any = type(body)

    def forward(self: Any, *arguments: Any, **named: Any) -> mx.array:
        hidden = kind.__call__(self, *arguments, **named)
        cache = named.get("cache", arguments[1] if len(arguments) > 1 else None)
        mx.eval(hidden, [_state(one) for one in cache or []])
        return hidden

    body.__class__ = type(f"Stage{kind.__name__}", (kind,), {"__call__": forward})


def _state(cache: Any) -> Any:
    """Return the arrays that a pass wrote into one block's cache."""
    keys, values = getattr(cache, "keys", None), getattr(cache, "values", None)
    if keys is not None:
        return [keys, values]
    return [one for one in getattr(cache, "cache", None) or [] if one is not None]


def agreed_sampler(
    sampler: Callable[[mx.array], mx.array], model: Any
) -> Callable[[mx.array], mx.array]:
    """Return ``sampler``, of a divided ``model`` one that gives every rank the tokens of rank 0.

    Machines of two kinds may round a logit to two sides of another one; a rank that stopped at
    another token would leave the others waiting.
    """
    if divided_by(model) is None:
        return sampler
    group = world()

    def agreed(logprobs_RV: mx.array) -> mx.array:
        tokens_R = sampler(logprobs_RV)
        mine = tokens_R if group.rank() == 0 else mx.zeros_like(tokens_R)
        return mx.distributed.all_sum(mine, group=group, stream=mx.cpu)

    return agreed
