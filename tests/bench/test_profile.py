"""The components of a training step: counted in closed form, and nothing of the model changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_slim.bench import profile as profiling
from mlx_slim.bench import train
from mlx_slim.bench.options import BenchTrainOptions
from mlx_slim.bench.sides import RANK, TrainWork, training
from mlx_slim.cli.bench import _show_profile
from mlx_slim.models import structure
from mlx_slim.training.chunk_size import part_count
from tests.support.runs import write_rows
from tests.support.tiny import TinyModels

WIDTH, INNER, VALUES, BLOCKS = 64, 128, 32, 3  # of the tiny llama


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "LEAST_SECONDS", 1e-4)


@pytest.fixture(scope="module")
def work(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> TrainWork:
    rows = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 12)
    return TrainWork(str(tiny("llama")), str(rows), "lora", 4, 96, "float32")


@pytest.fixture(scope="module")
def measured(work: TrainWork) -> dict[str, Any]:
    return profiling.profile(work)


def test_products_are_counted_in_closed_form(measured: dict[str, Any], work: TrainWork) -> None:
    by_name = {component["name"]: component for component in measured["components"]}
    with training(work) as (loop, _):
        shards = [
            shard
            for batch in map(loop.batcher.batch, loop.batcher.plan(0))
            for shard in loop.stepper.shards(
                batch, part_count(loop.stepper.num_threads, batch.computed_tokens)
            )
        ]
    positions = sum(shard.tokens_BT.size for shard in shards)
    # q and o are as wide as the model; gate and up are of one shape, down of the other.
    square = 4e-9 * positions * WIDTH * WIDTH * 2 * BLOCKS
    assert by_name[f"linear {WIDTH} x {WIDTH}"]["gflop"] == pytest.approx(square)
    assert by_name[f"linear {WIDTH} x {WIDTH}"]["calls"] == 2 * BLOCKS * len(shards)
    gated = 4e-9 * positions * WIDTH * INNER * 2 * BLOCKS
    assert by_name[f"linear {WIDTH} x {INNER}"]["gflop"] == pytest.approx(gated)
    sizes = 2 * (2 * WIDTH) + 2 * (WIDTH + VALUES) + 3 * (WIDTH + INNER)
    thin = 6e-9 * positions * RANK * sizes * BLOCKS
    assert by_name["adapters"]["gflop"] == pytest.approx(thin)
    assert by_name["RMSNorm"]["calls"] == 2 * BLOCKS * len(shards)
    assert by_name["RoPE"]["calls"] == 2 * BLOCKS * len(shards)


def test_the_components_and_what_remains_are_the_whole(measured: dict[str, Any]) -> None:
    whole = sum(component["seconds"] for component in measured["components"])
    assert whole == pytest.approx(measured["seconds"])
    names = {component["name"] for component in measured["components"]}
    assert {
        profiling.HEAD,
        profiling.OUTSIDE,
        profiling.REMAINDER,
        "self_attn without its layers",
    } <= names
    ceiling = measured["tokens"] / (measured["gflop"] / measured["blas_gflops"])
    assert measured["ceiling_tokens_per_second"] == pytest.approx(ceiling)


def test_attention_is_counted_by_pairs_of_positions(work: TrainWork) -> None:
    with training(work) as (loop, _):
        batch = loop.batcher.batch(loop.batcher.plan(0)[0])
        attention = structure.blocks(loop.model)[0]["self_attn"]
        x_BTD = mx.zeros((*batch.tokens_BT.shape, WIDTH))
        call = profiling.ModuleCall("self_attn", attention, (x_BTD,), {}, batch, calls=2)
        rows, length = batch.tokens_BT.shape
        assert profiling._attention_gflop(call) == pytest.approx(24e-9 * rows * length**2 * WIDTH)
        call.path = "mlp"
        assert profiling._attention_gflop(call) == 0


def test_the_recorder_leaves_the_model_as_it_was(work: TrainWork) -> None:
    with training(work) as (loop, _):
        classes = [type(module) for _, module in loop.model.named_modules()]
        batch = loop.batcher.batch(loop.batcher.plan(0)[0])
        before = loop.stepper.micro(batch)[0].tolist()
        recorder = profiling.Recorder(loop.model)
        recorder.batch = batch
        during = loop.model(mx.array(batch.tokens_BT))  # pyright: ignore[reportCallIssue]
        recorder.close()
        assert [type(module) for _, module in loop.model.named_modules()] == classes
        after = loop.model(mx.array(batch.tokens_BT))  # pyright: ignore[reportCallIssue]
        assert mx.array_equal(during, after)
        profiling.measure_components(recorder, 2)
        assert loop.stepper.micro(batch)[0].tolist() == before


def test_the_table_names_components_and_the_ceiling(
    measured: dict[str, Any],
    work: TrainWork,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(train, "run_side", lambda module, side, work: measured)
    options = BenchTrainOptions(data=work.rows, rows=12, profile=True)
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    record = train.bench_train(
        work.model, BenchTrainOptions(data=str(rows), rows=12, profile=True), lambda line: None
    )
    assert record["work"]["method"] == options.method
    _show_profile(record["profile"])
    printed = capsys.readouterr().out
    assert f"linear {WIDTH} x {WIDTH}" in printed and "of BLAS" in printed
    assert f"{measured['ceiling_tokens_per_second']:.1f}" in printed
