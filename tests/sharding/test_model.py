"""Three ranks with a slice each: the gradient of one rank, in the memory of a third.

One launch for all tests: each rank of it compares itself with the whole model (``ranks.py``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_slim.config.load import from_values
from mlx_slim.models.load import read_config
from mlx_slim.planner.links import sharded_traffic
from mlx_slim.planner.shapes import training_shapes
from tests.support.runs import run_script
from tests.support.tiny import tiny_model

RANKS, BLOCKS = 3, 18
SCRIPT = """
import sys
from pathlib import Path
from tests.sharding.ranks import main
main(*map(Path, sys.argv[1:3]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose blocks are far larger than its embedding and what a few tokens need."""
    return tiny_model(
        tmp_path_factory.mktemp("deep"),
        hidden_size=160,  # three ranks do not divide it
        intermediate_size=448,
        num_hidden_layers=BLOCKS,
        num_attention_heads=5,
        num_key_value_heads=1,
    )


@pytest.fixture(scope="module")
def out(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks wrote."""
    target = tmp_path_factory.mktemp("ranks")
    done = run_script(SCRIPT, folder, target, ranks=RANKS)
    assert len(list(target.glob("rank-*.json"))) == RANKS, done.stderr
    return target


def of_ranks(out: Path) -> list[dict[str, Any]]:
    """Return what each rank measured."""
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_gradients_are_those_of_one_rank(out: Path, method: str) -> None:
    for rank in of_ranks(out):
        measured = rank[method]
        assert abs(measured["loss"]) < 1e-5 * measured["reference"]
        assert measured["gradient"] < 2e-6 * measured["norm"]
        assert measured["evaluated"] == pytest.approx(measured["reference"], rel=1e-6)
    assert len({rank[method]["norm"] for rank in of_ranks(out)}) == 1


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_bytes_that_a_rank_sends_are_those_of_the_planner(
    out: Path, folder: Path, method: str
) -> None:
    values = {"model": str(folder), "method": method, "data": {"path": "rows"}}
    values |= {"adapter": {"rank": 4, "dropout": 0.0}, "quantize": {"group_size": 32}}
    recipe = from_values(values, "sharded", "test").recipe
    shapes = training_shapes(read_config(folder), recipe, mx.float32)
    predicted = sharded_traffic(shapes, RANKS, 1).sent
    for rank in of_ranks(out):
        sent = rank[method]["sent_slices"] + rank[method]["sent_gradients"]
        # Three ranks divide neither 160 rows nor a rank of 4: padded; norms are gathered twice.
        assert predicted < sent < 1.05 * predicted


def block_bytes(folder: Path) -> int:
    """Return the bytes of a block."""
    arrays: dict[str, mx.array] = {}
    for file in folder.glob("*.safetensors"):
        arrays |= mx.load(str(file))  # type: ignore[operator,arg-type]
    return sum(value.nbytes for path, value in arrays.items() if ".layers.0." in path)


@pytest.mark.parametrize(("method", "copies"), [("full", 2), ("lora", 1)])
def test_a_rank_holds_its_slices_and_few_blocks(
    out: Path, folder: Path, method: str, copies: int
) -> None:
    """``copies``: of its slices, weights and gradients; MLX allocates some operations ahead."""
    block = block_bytes(folder)
    for rank in of_ranks(out):
        measured = rank[method]
        assert measured["slices"] < 1.05 * measured["whole"] / RANKS
        assert measured["loading"] < measured["slices"] + block  # one tensor at a time
        assert measured["peak"] < copies * measured["slices"] + 4.5 * block
        assert measured["peak"] < copies * measured["whole"] * 0.75


def test_files_are_whole_whoever_wrote_them(out: Path, folder: Path) -> None:
    arrays: dict[str, mx.array] = {}
    for file in folder.glob("*.safetensors"):
        arrays |= mx.load(str(file))  # type: ignore[operator,arg-type]
    slices: Any = mx.load(str(out / "model.safetensors"))
    assert arrays.keys() == slices.keys()
    assert all(mx.array_equal(arrays[path], slices[path]) for path in arrays)
    assert all(rank["files"] == {"same": True, "received": True} for rank in of_ranks(out))
