"""Where the seconds of a training step go: its components one by one, beside the whole step.

Invariant: a component is a module of the model, run forward and backward on the arrays that it got
in the step, by as many threads at a time as train; what a module costs without the modules inside
it is the difference. Seconds of components are wall time with all threads busy, so what the whole
step takes besides them is Python, waiting and what cannot be taken apart. Where steps are compiled,
or blocks computed in pieces with NumPy between them (a CPU), the components are still computed one
by one, by MLX: the whole may then be less than their sum. Try it:
``mlx-slim bench train MODEL --profile``. Legend: M rows of a product, I inputs, O outputs.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any, cast

import mlx_slim  # noqa: F401  # before mlx.core: the BLAS of training
from mlx_slim import blas
from mlx_slim.adapters.lora import Adapter, dimensions
from mlx_slim.bench.module_calls import (
    Compute,
    ModuleCall,
    Recorder,
    components_of,
    vector_jacobian,
)
from mlx_slim.bench.sides import TrainWork, training
from mlx_slim.data.batches import Batch
from mlx_slim.models import structure
from mlx_slim.models.prefix_attention import prefix_attention
from mlx_slim.reading import JsonObject
from mlx_slim.threads import run_in_threads
from mlx_slim.training.chunk_size import part_count
from mlx_slim.training.cross_entropy import CrossEntropy, batch_arrays, supervised_rows

import mlx.core as mx  # isort: skip
import mlx.nn as nn  # isort: skip
from mlx.utils import tree_flatten  # isort: skip

ROUNDS = 3  # the quickest counts: others may use the machine
LEAST_SECONDS = 0.03  # of a round; short components are repeated
MOST_REPEATS = 32
HEAD = "head and loss"
OUTSIDE = "clipping, optimizer, events"
REMAINDER = "Python, waiting, not taken apart"
_ATTENTION = ("attn", "attention")
_OUTPUTS = ("o_proj", "dense", "out_proj", "wo")


@dataclass
class Component:
    """What a component of the steps takes.

    Attributes:
        name: Of it.
        calls: How often it was computed.
        seconds: Wall time with all threads busy.
        gflop: Of its matrix products, forward and backward, 1e9 operations.
    """

    name: str
    calls: int = 0
    seconds: float = 0.0
    gflop: float = 0.0

    def add(self, calls: int, seconds: float, gflop: float = 0.0) -> None:
        """Count ``calls`` more."""
        self.calls += calls
        self.seconds += seconds
        self.gflop += gflop


def seconds_of(compute: Compute, batch: Batch, threads: int) -> float:
    """Return the wall time of a call, divided by the threads that compute it at a time.

    Args:
        compute: Builds the arrays of one call.
        batch: Its list of nodes, where rows have beginnings in common.
        threads: That run side by side.
    """
    building = threading.Lock()

    def once(repeats: int, barrier: threading.Barrier) -> float:
        with building, prefix_attention(batch.nodes):
            graphs = [compute() for _ in range(repeats)]
        barrier.wait()
        began = time.perf_counter()
        mx.eval(graphs)
        barrier.wait()
        return (time.perf_counter() - began) / repeats

    def round_of(repeats: int) -> float:
        if threads == 1:
            return once(repeats, threading.Barrier(1))
        barrier = threading.Barrier(threads)
        with blas.single_threaded():
            work = [(repeats, barrier)] * threads
            return max(run_in_threads(once, work, threads)) / threads

    first = round_of(1)
    repeats = max(1, min(MOST_REPEATS, int(LEAST_SECONDS / max(first, 1e-6))))
    return min(first, *(round_of(repeats) for _ in range(ROUNDS)))


def measure_components(recorder: Recorder, threads: int) -> dict[str, Component]:
    """Return name -> component of the blocks; what the modules in a module take is taken off it.

    Args:
        recorder: Saw the steps.
        threads: That train side by side.
    """
    components: dict[str, Component] = {}

    def component(name: str) -> Component:
        return components.setdefault(name, Component(name))

    for call in recorder.calls.values():
        module, hidden = call.module, call.arguments[0]
        seconds = seconds_of(call.compute(module), call.batch, threads) * call.calls
        if call.path:
            component(_rest(call.path.rpartition(".")[0])).seconds -= seconds
        if isinstance(module, Adapter):
            base = cast(Any, module)["linear"]
            alone = seconds_of(vector_jacobian(base, [hidden], base), call.batch, threads)
            component(_name(base)).add(call.calls, alone * call.calls, _linear_gflop(base, call))
            thin = 6e-9 * call.rows * cast(Any, module).lora_a.shape[-1] * sum(dimensions(base))
            component("adapters").add(call.calls, seconds - alone * call.calls, thin * call.calls)
        elif structure.is_linear(module):
            component(_name(module)).add(call.calls, seconds, _linear_gflop(module, call))
        elif components_of(module):
            component(_rest(call.path)).add(call.calls, seconds, _attention_gflop(call))
        else:
            component(type(module).__name__).add(call.calls, seconds)
    return components


def _rest(path: str) -> str:
    """Return the name of what a module does besides the modules in it."""
    return f"{path or 'block'} without its layers"


def _name(linear: nn.Module) -> str:
    inputs, outputs = dimensions(linear)
    return f"linear {inputs} x {outputs}"


def _linear_gflop(linear: nn.Module, call: ModuleCall) -> float:
    """Return 1e9 operations of all calls: 2·M·I·O forward, by input and, trained, by weight."""
    inputs, outputs = dimensions(linear)
    passes = 3 if tree_flatten(linear.trainable_parameters()) else 2
    return 2e-9 * call.rows * inputs * outputs * passes * call.calls


def _attention_gflop(call: ModuleCall) -> float:
    """Return 1e9 operations of scores and values of all calls: 12 a pair and query width."""
    output = next((call.module[name] for name in _OUTPUTS if name in call.module), None)
    if output is None or not any(word in call.path for word in _ATTENTION):
        return 0.0
    base = output["linear"] if isinstance(output, Adapter) else output
    rows, length = call.arguments[0].shape[:2]
    pairs = rows * length**2
    if call.batch.nodes is not None:
        pairs = sum((n.end - n.begin) * (n.end - n.begin + n.depth) for n in call.batch.nodes)
    return 12e-9 * pairs * dimensions(base)[0] * call.calls


def measure_head(objective: CrossEntropy, batch: Batch, dtype: mx.Dtype, threads: int) -> Component:
    """Return what head and loss of ``batch`` take; of a model that does not split, nothing."""
    split = objective.split
    if split is None:
        return Component(HEAD)
    _, _, targets_N, _, *rest = objective.arrays(batch)
    width = dimensions(_dense(split.head.module))[0 if not split.head.tied else 1]
    hidden_ND = mx.random.normal((len(batch.targets_N), width)).astype(dtype)
    mx.eval(hidden_ND, targets_N, rest)

    def loss(hidden_ND: mx.array) -> mx.array:
        return objective.head_loss(hidden_ND, (targets_N, *rest), gradient=True)

    seconds = seconds_of(vector_jacobian(loss, [hidden_ND], split.head.module), batch, threads)
    trained = bool(tree_flatten(split.head.module.trainable_parameters()))
    gflop = 2e-9 * hidden_ND.size * split.head.vocabulary * (3 if trained else 2)
    return Component(HEAD, 1, seconds, gflop)


def _dense(module: nn.Module) -> nn.Module:
    for name in ("linear", "embedding"):
        if isinstance(module, Adapter) and name in module:
            return cast(Any, module)[name]
    return module


def blas_gflops(rows: int, inputs: int, outputs: int, dtype: mx.Dtype, threads: int) -> float:
    """Return the rate of the product (M, I) x (I, O) by ``threads`` at a time, 1e9 operations/s."""
    x_MI = mx.random.normal((rows, inputs)).astype(dtype)
    w_OI = mx.random.normal((outputs, inputs)).astype(dtype)
    mx.eval(x_MI, w_OI)
    empty = cast(Batch, SimpleNamespace(nodes=None))
    seconds = min(seconds_of(lambda: [x_MI @ w_OI.T], empty, threads) for _ in range(2))
    return 2e-9 * rows * inputs * outputs / seconds


def profile(work: TrainWork) -> JsonObject:
    """Train an epoch, then measure its components.

    Returns:
        ``seconds`` of the epoch's steps, ``tokens``, ``threads``, ``components``, ``blas_gflops``
        and ``ceiling_tokens_per_second``, where all products ran at that rate and nothing else
        took time.
    """
    with training(work) as (loop, steps):
        loop.run()
        batches = [loop.batcher.batch(groups) for groups in loop.batcher.plan(0)]
        model, stepper = loop.model, loop.stepper
        began = time.perf_counter()
        for batch in batches:
            stepper.micro(batch)
        micro = time.perf_counter() - began
        objective = loop.objective
        assert isinstance(objective, CrossEntropy)
        recorder, threads = Recorder(model), 1
        components: dict[str, Component] = {}
        heads = Component(HEAD)
        with contextlib.ExitStack() as undo:
            undo.callback(recorder.close)
            shards_of = [
                stepper.shards(batch, part_count(stepper.num_threads, batch.computed_tokens))
                for batch in batches
            ]
            threads = max(1, min(stepper.num_threads, max(map(len, shards_of))))
            for shard in (shard for shards in shards_of for shard in shards):
                recorder.batch = shard
                tokens_BT, positions_N, _, segments_BT = batch_arrays(shard)
                with prefix_attention(shard.nodes):
                    mx.eval(
                        supervised_rows(model, objective.split, tokens_BT, positions_N, segments_BT)
                    )
        components = measure_components(recorder, threads)
        dtype = next(iter(recorder.calls.values())).arguments[0].dtype
        for shard in (shard for shards in shards_of for shard in shards):
            one = measure_head(objective, shard, dtype, threads)
            heads.add(one.calls, one.seconds, one.gflop)
        components[HEAD] = heads
        largest = max(
            (c for c in recorder.calls.values() if structure.is_linear(_dense(c.module))),
            key=lambda call: _linear_gflop(_dense(call.module), call) / call.calls,
        )
        rate = blas_gflops(largest.rows, *dimensions(_dense(largest.module)), dtype, threads)
    tokens = sum(step.tokens for step in steps)
    seconds = sum(step.tokens / step.tokens_per_second for step in steps)
    components[OUTSIDE] = Component(OUTSIDE, len(steps), seconds - micro)
    components[REMAINDER] = Component(
        REMAINDER,
        0,
        micro - sum(component.seconds for name, component in components.items() if name != OUTSIDE),
    )
    gflop = sum(component.gflop for component in components.values())
    return {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "threads": threads,
        "components": [
            asdict(component)
            for component in sorted(components.values(), key=lambda one: -one.seconds)
        ],
        "gflop": gflop,
        "blas_gflops": rate,
        "ceiling_tokens_per_second": tokens / (gflop / rate),
    }


def main() -> None:
    """Profile the work given as JSON behind the name of the side; print one line of JSON."""
    with contextlib.redirect_stdout(sys.stderr):
        result = profile(TrainWork(**json.loads(sys.argv[2])))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
