"""EoRA: the best adapter of its rank, made of inputs and errors; and what ``quantize`` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.adapters.store import load_adapter
from mlx_slim.cli.main import run
from mlx_slim.models.load import load
from mlx_slim.models.opening import open_weights
from mlx_slim.quantization.apply import load_quantized
from mlx_slim.quantization.compensation import best_factors, compensate
from mlx_slim.quantization.policy import leaves, quantize_config
from tests.support.stock import stock_load
from tests.support.tiny import TinyModels, tiny_model

ROWS = mx.random.randint(0, 256, (3, 24), key=mx.random.key(0)).astype(mx.int32)


def _problem(outputs: int, inputs: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an error (O, I) and inputs (I, tokens) of uneven strength."""
    draw = np.random.default_rng([outputs, inputs, tokens])
    x_IN = draw.normal(size=(inputs, tokens)) * np.geomspace(1, 1e-2, inputs)[:, None]
    return draw.normal(size=(outputs, inputs)), draw.permutation(x_IN)


def _loss(error_OI: np.ndarray, x_IN: np.ndarray) -> float:
    return float(np.square(error_OI @ x_IN).sum() / x_IN.shape[1])


@pytest.mark.parametrize("outputs", [12, 40])
@pytest.mark.parametrize("tokens", [500, 9], ids=["many tokens", "fewer tokens than inputs"])
def test_the_error_is_the_dropped_singular_values(outputs: int, tokens: int) -> None:
    error_OI, x_IN = _problem(outputs, 24, tokens)
    moment_II = x_IN @ x_IN.T / tokens
    values = np.linalg.svd(error_OI @ x_IN / np.sqrt(tokens), compute_uv=False)
    u, s, vt = np.linalg.svd(error_OI)
    for rank in (1, 4, 8):
        best = best_factors(error_OI, moment_II, rank)
        assert best.a_RI.shape == (rank, 24) and best.b_OR.shape == (outputs, rank)
        dropped = float(np.square(values[rank:]).sum())
        after = _loss(error_OI - best.b_OR @ best.a_RI, x_IN)
        assert after == pytest.approx(dropped, rel=1e-6)
        assert best.after == pytest.approx(dropped, rel=1e-6)
        assert best.before == pytest.approx(_loss(error_OI, x_IN), rel=1e-9)
        plain = error_OI - (u[:, :rank] * s[:rank]) @ vt[:rank]
        assert after < _loss(plain, x_IN)
        small = [factor.astype(np.float16).astype(np.float64) for factor in (best.b_OR, best.a_RI)]
        assert _loss(error_OI - small[0] @ small[1], x_IN) == pytest.approx(dropped, rel=1e-3)


def test_inputs_that_the_text_never_had_are_not_made_worse() -> None:
    error_OI, x_IN = _problem(20, 24, 5)
    best = best_factors(error_OI, x_IN @ x_IN.T / 5, 4)
    others_IN = np.random.default_rng(1).normal(size=(24, 50))
    left_OI = error_OI - best.b_OR @ best.a_RI
    lengths = np.linalg.norm(left_OI @ others_IN, axis=0)
    assert (lengths <= np.linalg.norm(error_OI @ others_IN, axis=0) * (1 + 1e-12)).all()


@pytest.mark.parametrize("rank", [9, 24])
def test_a_rank_that_leaves_nothing(rank: int) -> None:
    error_OI, x_IN = _problem(40, 24, 9)
    best = best_factors(error_OI, x_IN @ x_IN.T / 9, rank)
    assert best.after < 1e-12 * best.before
    assert _loss(error_OI - best.b_OR @ best.a_RI, x_IN) < 1e-12 * best.before
    zero = best_factors(np.zeros((40, 24)), x_IN @ x_IN.T / 9, 4)
    assert not zero.a_RI.any() and zero.before == zero.after == 0


@pytest.mark.parametrize("architecture", ["llama-tied", "phi", "qwen3_moe"])
def test_adapters_on_a_model_reach_the_optimum(
    tiny: TinyModels, architecture: str, device: str
) -> None:
    """Of the first block, whose inputs are the same with and without adapters in earlier ones."""
    folder = tiny(architecture)
    quantized, _ = load_quantized(folder, quantize_config(2, 32))
    originals = dict(leaves(open_weights(folder, dtype=mx.float32)[0]))
    adapted = compensate(quantized.model, originals, ROWS, 4, mx.float32)
    experts = [path for path in adapted.left_out if "switch_mlp" in path]
    assert adapted.left_out == experts and bool(experts) == (architecture == "qwen3_moe")
    assert 0 < adapted.remaining < 1
    path = "model.layers.0.self_attn.q_proj"
    adapter: Any = dict(quantized.model.named_modules())[path]
    dense: Any = dict(leaves(load(folder).model))[path]
    left = adapter.merged_weight() - dense["weight"]
    lost = adapter.linear
    plain = np.linalg.norm(np.array(left)) / np.linalg.norm(
        np.array(mx.dequantize(lost.weight, lost.scales, lost.biases, 32, 2) - dense["weight"])
    )
    assert 0.3 < plain < 1, "most of the error's directions are left"


def _options(text: Path) -> list[str]:
    return ["--calibration", str(text), "--calibration-length", "32", "--calibration-samples", "3"]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_model(tmp_path / "source", dtype=mx.bfloat16)
    text, out = tmp_path / "notes.txt", tmp_path / "out"
    text.write_text("\n".join(f"{i}: a line of plain words to look at" for i in range(60)))
    words = ["quantize", str(source), "-o", str(out), *_options(text), "--json"]
    assert run([*words, "--bits", "2", "--group-size", "32", "--compensate", "8"]) == 0
    record = json.loads(capsys.readouterr().out)
    adapted = record["compensated"]
    assert adapted["fidelity"]["kl"] < 0.8 * record["fidelity"]["kl"]
    assert adapted["nbytes"] == 2 * adapted["parameters"] and adapted["left_out"] == []
    stored = mx.load(str(out / "adapters" / "adapters.safetensors"))
    assert sum(value.nbytes for value in stored.values()) == adapted["nbytes"]  # type: ignore[union-attr]
    loaded = load(out)
    load_adapter(loaded.model, out / "adapters")
    stock, _ = stock_load(str(out), adapter_path=str(out / "adapters"))
    tokens = mx.array([[5, 6, 7, 8]])
    assert mx.allclose(
        loaded.model(tokens).astype(mx.float32), stock(tokens).astype(mx.float32), atol=0.05
    )
    for more, message in [
        (["--compensate", "8", "--method", "awq"], "awq scales the weights"),
        (["--compensate", "8", "--method", "blockwise"], "blockwise trains the weights"),
        (["--compensate", "0"], "not in the range"),
        (["--compensate", "900", "--group-size", "32"], "none takes that rank"),
    ]:
        words[3] = str(tmp_path / "other")
        assert run([*words[:4], *_options(text), *more]) == 2
        assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"source", "notes.txt", "out"}
