"""What several ranks do in ``test_model.py``; each prints one JSON line.

``python -m tests.sharding.ranks FOLDER OUT`` in each rank.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_slim.adapters.inject import inject
from mlx_slim.artifacts import load_tensors
from mlx_slim.config.schema import AdapterConfig, QuantizeConfig
from mlx_slim.models.opening import open_weights, read_weights
from mlx_slim.planner.shapes import leaves
from mlx_slim.quantization.apply import quantize_model
from mlx_slim.ranks.state import state
from mlx_slim.runtime import memory_limits, world
from mlx_slim.sharding.files import read_slices, receive_slices, write_whole
from mlx_slim.sharding.model import ShardedModel

TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8], [1, 4, 1, 4, 2, 1, 3, 5]])


def opened(folder: Path, method: str) -> nn.Module:
    """Return an unread model whose trainable parameters are chosen."""
    model, config, _ = open_weights(folder)
    if method == "qlora":
        quantize_model(model, config, QuantizeConfig(group_size=32))
    mx.random.seed(0)
    if method == "full":
        model.unfreeze()
    else:
        inject(model, AdapterConfig(rank=4, dropout=0.0), dora=False)
    model.train()
    return model


def loss(model: nn.Module, tokens_BT: mx.array) -> mx.array:
    """Return the sum of the next-token cross-entropy."""
    logits = model(tokens_BT[:, :-1])
    return nn.losses.cross_entropy(logits, tokens_BT[:, 1:], reduction="sum")


def compare(folder: Path, method: str) -> dict[str, float]:
    """Return how far the slices are from what one rank computes, and what memory both took."""
    group = world()
    rows = TOKENS[group.rank() :: group.size()]
    gc.collect()
    mx.reset_peak_memory()
    start = mx.get_active_memory()
    model = opened(folder, method)
    sharded = ShardedModel(model, group)
    record: dict[str, float] = {"loading": mx.get_peak_memory() - start}
    record["slices"] = mx.get_active_memory() - start
    mx.reset_peak_memory()

    def sharded_loss(model: nn.Module, tokens_BT: mx.array) -> mx.array:
        sharded.gather_trained()
        return loss(model, tokens_BT)

    before = state.sent.copy()
    with sharded.outside_blocks(trained=False):
        value, gradients = nn.value_and_grad(model, sharded_loss)(model, rows)
        mx.eval(value, gradients)
    record["peak"] = mx.get_peak_memory() - start
    record |= {f"sent_{what}": state.sent[what] - before[what] for what in ("slices", "gradients")}
    slices = dict(tree_flatten(gradients))
    record["norm"] = float(sharded.norm(slices))
    model.eval()
    with sharded.outside_blocks():
        record["evaluated"] = float(loss(model, TOKENS))
    one = opened(folder, method)
    read_weights(one)
    value_one, whole = nn.value_and_grad(one, loss)(one, TOKENS)
    whole = dict(tree_flatten(whole))
    record["loss"] = float(mx.distributed.all_sum(value, group=group) - value_one)
    record["reference"] = float(value_one)
    record["gradient"] = max(
        float(mx.abs(sharded.cut(path, value) - slices[path]).max())
        for path, value in whole.items()
    )
    record["whole"] = sum(value.nbytes for _, value in leaves(one))
    return record


def files(folder: Path, out: Path) -> dict[str, bool]:
    """Write a model and a checkpoint from slices, read the checkpoint back into other slices."""
    group = world()
    model = opened(folder, "full")
    sharded = ShardedModel(model, group)
    parameters = dict(tree_flatten(model.parameters()))
    first = group.rank() == 0
    write_whole(out / "model.safetensors" if first else None, parameters, sharded)
    moments = {f"adamw@1.0/{path}/m": value for path, value in parameters.items()}
    moments["adamw@1.0/step/"] = mx.array(3, dtype=mx.uint64)
    write_whole(out / "optimizer.safetensors" if first else None, moments, sharded)
    mx.eval(mx.distributed.all_sum(mx.array(1), group=group))
    again = read_slices(load_tensors(out / "optimizer.safetensors"), moments, sharded)
    received = receive_slices(out / "model.safetensors", parameters, sharded)
    return {
        "same": all(bool(mx.array_equal(again[name], moments[name])) for name in moments),
        "received": all(bool(mx.array_equal(received[p], v)) for p, v in parameters.items()),
    }


def main(folder: Path, out: Path) -> None:
    """Write what this rank measured to ``out``."""
    with memory_limits(1 << 30):
        answer: dict[str, object] = {
            method: compare(folder, method) for method in ("full", "lora", "qlora")
        }
        answer["files"] = files(folder, out)
    (out / f"rank-{world().rank()}.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
