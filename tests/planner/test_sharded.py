"""A rank of a sharded run needs less with more ranks, and never less than what is whole."""

from __future__ import annotations

import pytest

from mlx_slim.models.load import read_config
from mlx_slim.planner.memory import predict
from mlx_slim.planner.shapes import training_shapes
from mlx_slim.planner.sharded import among_ranks, loading_bytes
from mlx_slim.runtime import resolve_dtype
from tests.support.runs import recipe
from tests.support.tiny import TinyModels

KINDS = {"weights": 1000, "gradients": 400, "optimizer": 800, "activations": 50, "logits": 7}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_slices_shrink_and_what_is_gathered_stays(tiny: TinyModels, method: str) -> None:
    model = tiny("llama")
    small = recipe(model, model, method).recipe
    shapes = training_shapes(read_config(model), small, resolve_dtype("auto"))
    two, four = (among_ranks(KINDS, shapes, small, ranks) for ranks in (2, 4))
    assert (two["optimizer"], four["optimizer"]) == (400, 200)
    assert two["weights"] - four["weights"] == 250  # the gathered block stays
    assert four["weights"] > 1000 // 4
    assert two["gradients"] - four["gradients"] == 100
    assert (four["gradients"] > 100) is (method == "full")  # whole gradients of a block
    assert (two["activations"], two["logits"]) == (50, 7)
    assert loading_bytes(shapes, 4) < loading_bytes(shapes, 2) < shapes.loading_bytes


def test_a_plan_of_one_rank_is_what_it_was(tiny: TinyModels) -> None:
    model = tiny("llama")
    config = read_config(model)
    plain, full = (recipe(model, model, "full", shard=shard).recipe for shard in ("none", "full"))
    assert predict(config, full).breakdown == predict(config, plain).breakdown
