"""The machines of a host file: whether they would compute the same, and how fast their link is.

Invariant: every rank reports the same facts under the same names, rank 0 compares them; nothing is
trained or written. Rates are those of MLX's own collectives, as training uses them. Try it:
``mlx-slim doctor --hosts hosts.json --recipe smollm2-lora``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

import mlx.core as mx

from mlx_slim import artifacts, runtime
from mlx_slim.agreement import differences, gather, machine, on_every_rank
from mlx_slim.bench.machine import device
from mlx_slim.config.load import load_recipe
from mlx_slim.finetuning.rank_facts import rank_facts, version_facts
from mlx_slim.models.load import read_config
from mlx_slim.planner.shapes import training_shapes
from mlx_slim.reading import JsonObject

_LATENCY_ROUNDS = 50
_ROUNDS = 5
_PAYLOAD = 1 << 24  # bytes: long enough that latency does not count


@dataclass(frozen=True)
class LinkSpeed:
    """What the link between the ranks does.

    Attributes:
        latency_us: Median of an all-reduce of one number, microseconds, over its ring hops.
        megabytes_per_second: That a rank sends during an all-reduce of 16 MB, 1e6 bytes a second.
        gradient_bytes: Bytes that a rank sums in a step of the recipe; None without one.
        gradient_seconds: Median time of that all-reduce; None likewise.
    """

    latency_us: float
    megabytes_per_second: float
    gradient_bytes: int | None = None
    gradient_seconds: float | None = None


def compare_ranks(recipe: str | None, overrides: Sequence[str]) -> JsonObject:
    """Return what the ranks have, what differs, and the speed of their link; all ranks call it.

    Args:
        recipe: Name or file of a recipe whose model and rows are compared; None compares versions.
        overrides: ``KEY=VALUE`` of the recipe.

    Raises:
        SlimError: On one of the ranks: its recipe, model or rows cannot be read.
    """
    facts, gradients = on_every_rank(lambda: _facts(recipe, overrides))
    rows = gather(facts)
    names = gather([machine(), device()])
    return {
        "schema_version": artifacts.SCHEMA_VERSION,
        "ranks": [
            {"rank": rank, "host": host, "device": of, "facts": row}
            for rank, ((host, of), row) in enumerate(zip(names, rows, strict=True))
        ],
        "differences": [{"fact": name, "values": text} for name, text in differences(rows)],
        "link": asdict(measure_link(gradients)),
    }


def _facts(name: str | None, overrides: Sequence[str]) -> tuple[JsonObject, int | None]:
    """Return what must be equal on every rank, and the bytes of the recipe's gradients."""
    if name is None:
        return version_facts(), None
    recipe = load_recipe(name, overrides).recipe
    config = read_config(recipe.model, recipe.revision)
    shapes = training_shapes(config, recipe, runtime.resolve_dtype(recipe.train.dtype))
    return rank_facts(recipe), shapes.trainable_parameters * mx.float32.size


def measure_link(gradient_bytes: int | None = None) -> LinkSpeed:
    """Time the all-reduce of one number, of 16 MB and of gradients; all ranks call it.

    An all-reduce of b bytes over a ring of N ranks takes 2(N − 1) hops, and each rank sends
    2(N − 1)/N · b.

    Args:
        gradient_bytes: Of the third one; None leaves it out.
    """
    ranks = runtime.world().size()
    hops = max(1, 2 * (ranks - 1))
    one = _seconds(1, _LATENCY_ROUNDS) / hops
    many = _seconds(_PAYLOAD // 4, _ROUNDS)
    gradients = None if gradient_bytes is None else _seconds(max(1, gradient_bytes // 4), _ROUNDS)
    return LinkSpeed(
        latency_us=one * 1e6,
        megabytes_per_second=hops / ranks * _PAYLOAD / many / 1e6,
        gradient_bytes=gradient_bytes,
        gradient_seconds=gradients,
    )


def _seconds(count: int, rounds: int) -> float:
    """Return the median time of an all-reduce of ``count`` float32, as the slowest rank has it."""
    values = mx.zeros((count,))
    mx.eval(values)

    def once() -> float:
        began = time.perf_counter()
        mx.eval(mx.distributed.all_sum(values, group=runtime.world(), stream=mx.cpu))
        return time.perf_counter() - began

    once()
    return max(gather(median(once() for _ in range(rounds))))
