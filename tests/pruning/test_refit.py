"""``prune --compensate``: least squares on the columns that stay, against a solver."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.artifacts import weight_sizes
from mlx_slim.cli.main import run
from mlx_slim.models import structure
from mlx_slim.models.kinds import MLP
from mlx_slim.models.load import load
from mlx_slim.models.recorded_logits import RecordedLogits
from mlx_slim.pruning.refit import best_ridge, refit, refitted
from mlx_slim.pruning.run import PruneOptions, prune
from mlx_slim.quantization.calibration import _stream
from tests.support.tiny import TinyModels

ROWS = mx.random.randint(0, 256, (32, 24), key=mx.random.key(0)).astype(mx.int32)


@pytest.mark.parametrize("tokens", [200, 7], ids=["many tokens", "fewer tokens than columns"])
def test_columns_are_those_of_a_ridge_solver(tokens: int) -> None:
    draw = np.random.default_rng(tokens)
    weight_OI, mixing = draw.normal(size=(5, 16)), draw.normal(size=(16, 16))
    x_IN = mixing @ draw.normal(size=(16, tokens))
    stays = np.array([0, 3, 4, 5, 8, 9, 11, 15])
    goes = np.setdiff1d(np.arange(16), stays)
    columns, left = refitted(weight_OI, x_IN @ x_IN.T / tokens, stays)
    ridge = 1e-4 * np.square(x_IN[stays]).sum() / tokens / len(stays)
    # Least squares of the change, with √(ridge) rows that pull it to zero.
    lost = weight_OI[:, goes] @ x_IN[goes]
    system = np.vstack([x_IN[stays].T / np.sqrt(tokens), np.sqrt(ridge) * np.eye(len(stays))])
    target = np.vstack([lost.T / np.sqrt(tokens), np.zeros((len(stays), 5))])
    change = np.linalg.lstsq(system, target, rcond=None)[0].T
    assert np.allclose(columns, weight_OI[:, stays] + change, rtol=1e-6, atol=1e-8)
    after = np.square(lost - change @ x_IN[stays]).sum()
    assert left == pytest.approx(after / np.square(lost).sum(), rel=1e-6, abs=1e-12)
    assert 0 <= left < 1


@pytest.mark.parametrize("tokens", [20, 80, 5000])
def test_the_ridge_is_the_one_that_other_tokens_want(tokens: int) -> None:
    draw = np.random.default_rng(tokens)
    weight_OI, mixing = draw.normal(size=(5, 40)), draw.normal(size=(40, 12))
    stays = np.arange(0, 40, 2)
    halves = [
        mixing @ draw.normal(size=(12, tokens)) + draw.normal(size=(40, tokens)) for _ in range(2)
    ]
    fitted, judged = (x @ x.T / tokens for x in halves)
    ridge, left = best_ridge(weight_OI, fitted, judged, stays)
    lost = weight_OI[:, 1::2] @ halves[1][1::2]

    def error(ridge: float) -> float:
        columns, _ = refitted(weight_OI, fitted, stays, ridge)
        change = columns - weight_OI[:, stays]
        return np.square(lost - change @ halves[1][stays]).sum() / np.square(lost).sum()

    errors = {one: error(one) for one in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)}
    assert ridge is not None and errors[ridge] == min(errors.values())
    assert left == pytest.approx(errors[ridge], rel=1e-6) and left < 1
    assert (ridge >= 0.1) == (tokens < 1000), "few tokens want much of it"


def test_a_layer_stays_where_what_it_loses_does_not_follow_from_what_stays() -> None:
    draw = np.random.default_rng(0)
    weight_OI = draw.normal(size=(5, 40))
    fitted, judged = (x @ x.T / 30 for x in draw.normal(size=(2, 40, 30)))
    assert best_ridge(weight_OI, fitted, judged, np.arange(20)) == (None, 1.0)


def test_a_layer_that_reads_copies_loses_nothing() -> None:
    weight_OI = np.random.default_rng(0).normal(size=(3, 4))
    x_IN = np.random.default_rng(1).normal(size=(2, 50))[[0, 1, 1, 0]]
    columns, left = refitted(weight_OI, x_IN @ x_IN.T / 50, np.array([0, 2]))
    expected = np.stack([weight_OI[:, 0] + weight_OI[:, 3], weight_OI[:, 1] + weight_OI[:, 2]], 1)
    assert np.allclose(columns, expected, atol=1e-3) and left < 1e-7
    unused, left = refitted(weight_OI, np.zeros((4, 4)), np.array([0, 2]))
    assert np.array_equal(unused, weight_OI[:, [0, 2]]) and left == 0


@pytest.mark.parametrize("architecture", ["llama", "phi"])
def test_a_layer_is_refitted_on_inputs_from_the_pruned_blocks_before_it(
    tiny: TinyModels, architecture: str, device: str
) -> None:
    model, original = load(tiny(architecture)).model, load(tiny(architecture)).model
    stays = [np.arange(64), np.arange(128), np.arange(32, 128)]
    left = refit(model, {MLP: stays}, ROWS)
    assert len(left) == 2 and all(0 < one < 1 for one in left), "a layer that loses none stays"
    family = structure.coupled(structure.blocks(original)[2])[MLP]
    inputs: list[np.ndarray] = []
    layers: Any = [structure.blocks(one)[2] for one in (original, model)]
    for name in family.output.split("."):
        layers = [layer[name] for layer in layers]

    class Listening(type(layers[1])):
        def __call__(self, x: mx.array) -> mx.array:
            inputs.append(np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1]))
            return super().__call__(x)

    layers[1].__class__ = Listening
    model(ROWS)  # type: ignore[operator]
    weight = np.array(layers[0]["weight"].astype(mx.float32))
    x_NTI = inputs[0].astype(np.float64).reshape(*ROWS.shape, -1)
    fitted, judged = (
        np.einsum("nti,ntj->ij", x, x) / x[..., 0].size for x in (x_NTI[::2], x_NTI[1::2])
    )
    ridge, fraction = best_ridge(weight, fitted, judged, stays[2])
    assert ridge is not None
    expected, _ = refitted(weight, (fitted + judged) / 2, stays[2], ridge)
    columns = np.array(layers[1]["weight"].astype(mx.float32))
    assert not columns[:, :32].any(), "what goes is zero"
    columns = columns[:, 32:]
    assert np.abs(columns - expected).max() < 2e-2 * np.abs(expected).max()
    assert left[1] == pytest.approx(fraction, rel=0.05)
    unchanged: list[Any] = [structure.blocks(one)[1] for one in (original, model)]
    for name in family.output.split("."):
        unchanged = [layer[name] for layer in unchanged]
    before, after = (np.array(layer["weight"]) for layer in unchanged)
    assert np.array_equal(before, after)


def test_command_line(tiny: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("\n".join(f"{i}: a line of plain words to look at" for i in range(90)))
    words = ["--calibration", str(text), "--ratio", "0.5", "--held-out", "128", "--method", "l2"]
    words += ["--samples", "8", "--length", "32"]
    kl = {}
    for name, more in [("plain", []), ("refit", ["--compensate"])]:
        out = tmp_path / name
        assert run(["prune", str(tiny()), "-o", str(out), *words, *more, "--json"]) == 0
        record = json.loads(capsys.readouterr().out)
        kl[name] = record["fidelity"]["kl"]
        note = [one for one in record["notes"] if "layers refitted on 256 tokens" in one]
        assert bool(note) == bool(more) and record["options"]["compensate"] == bool(more)
    assert kl["refit"] < 0.9 * kl["plain"]
    sizes = [weight_sizes(tmp_path / name) for name in kl]
    assert sizes[0] == sizes[1], "no adapter, no bytes"
    assert run(["prune", str(tiny()), "-o", str(tmp_path / "no"), "--axis", "depth", *words[:4],
                "--compensate"]) == 2  # fmt: skip
    assert "--compensate: only for width pruning" in capsys.readouterr().err
    one = [*words[:6], "--method", "l2", "--samples", "1", "--compensate"]
    assert run(["prune", str(tiny()), "-o", str(tmp_path / "no"), *one]) == 2
    assert "--compensate with --samples 1: half of the rows chooses" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_calibration_text_is_behind_the_validation_text(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("\n".join(f"{i}: a line of plain words to look at" for i in range(90)))
    rows: dict[str, mx.array] = {}

    def recorded(model: Any, tokens_NT: mx.array, beside: Path) -> RecordedLogits:
        rows["validation"] = tokens_NT
        return RecordedLogits(model, tokens_NT, beside)

    def watched(model: Any, retained: Any, rows_NT: mx.array) -> list[float]:
        rows["refit"] = rows_NT
        return refit(model, retained, rows_NT)

    monkeypatch.setattr("mlx_slim.pruning.run.RecordedLogits", recorded)
    monkeypatch.setattr("mlx_slim.pruning.cutting.refit", watched)
    common = {"calibration": str(text), "samples": 4, "length": 32, "held_out": 100}
    options = PruneOptions(method="taylor", ratio=0.5, compensate=True, **common)  # type: ignore[arg-type]
    prune(tiny(), tmp_path / "out", options)
    ids = np.fromiter(_stream(str(text), load(tiny()).tokenizer, 400), np.int32)
    assert np.array_equal(np.array(rows["validation"]).ravel(), ids[:128])
    assert np.array_equal(np.array(rows["refit"]).ravel(), ids[128:256])
