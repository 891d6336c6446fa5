"""The loss of single layers: by its definition, from a block on, from the file, beside 8 bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_slim.bench.small_configs import small_config
from mlx_slim.errors import ResourceError, SlimError
from mlx_slim.models import fidelity
from mlx_slim.models.build import build
from mlx_slim.models.load import load
from mlx_slim.models.quantized import LayerFormat
from mlx_slim.models.route import splits_at_blocks
from mlx_slim.quantization import sensitivity
from mlx_slim.quantization.apply import rounded
from mlx_slim.quantization.policy import leaves
from mlx_slim.quantization.sensitivity import BITS, Losses, measured_losses
from tests.support.tiny import TinyModels

ROWS = mx.random.randint(0, 256, (2, 24), key=mx.random.key(0)).astype(mx.int32)
PATHS = [
    "model.layers.2.mlp.down_proj",
    "model.layers.0.self_attn.q_proj",
    "lm_head",
    "model.embed_tokens",
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_SLIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sensitivities"


def _measure(folder: Path, model: nn.Module | None, paths: list[str] = PATHS) -> Losses:
    return measured_losses(folder, paths, 32, ROWS, mx.float32, model, lambda _: None)


def _by_definition(folder: Path, path: str, bits: int) -> float:
    """Return KL(original ‖ original with one layer rounded), two models beside each other."""
    original, changed = load(folder).model, load(folder).model
    module = dict(leaves(changed))[path]
    module["weight"] = rounded(module["weight"], mx.float32, LayerFormat(32, bits))
    return fidelity.compare(original, changed, ROWS).kl  # type: ignore[arg-type]


def test_losses_are_those_of_the_definition(tiny: TinyModels) -> None:
    model = load(tiny()).model
    before: Any = tree_flatten(model.parameters())
    losses = _measure(tiny(), model)
    for path in PATHS:
        for bits in (2, 4):
            expected = _by_definition(tiny(), path, bits)
            assert losses[path][bits] == pytest.approx(expected, rel=1e-3, abs=5e-7), (path, bits)
        # More bits are not measured: the loss is quadratic in the error.
        assert losses[path][5] == pytest.approx(_by_definition(tiny(), path, 5), rel=0.4)
        assert [losses[path][bits] for bits in BITS] == sorted(losses[path].values(), reverse=True)
    after = dict(tree_flatten(model.parameters()))  # type: ignore[arg-type]
    assert all(mx.array_equal(value, after[path]) for path, value in before)
    assert len(after) == len(before)


def test_blocks_that_read_other_blocks_are_passed_as_a_whole() -> None:
    mx.random.seed(0)
    for model_type, alone in (("llama", True), ("gemma3n", False)):
        model = build(small_config(model_type)).eval()
        mx.eval(model.parameters())
        assert splits_at_blocks(model, ROWS[:1]) is alone


def test_a_killed_measurement_resumes_with_the_layer_it_lost(
    tiny: TinyModels, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny()).model
    whole = _measure(tiny(), model)
    (file,) = cache.iterdir()
    lines = file.read_text().splitlines(keepends=True)
    assert [json.loads(line)["layer"] for line in lines] == [PATHS[i] for i in (2, 3, 1, 0)]
    file.write_text("".join(lines[:2]) + lines[2][:30])
    measured: list[str] = []
    honest = sensitivity._measure

    def counted(model: nn.Module, layers: dict[str, nn.Module], *args: Any, **named: Any) -> None:
        measured.extend(layers)
        honest(model, layers, *args, **named)

    monkeypatch.setattr(sensitivity, "_measure", counted)
    assert _measure(tiny(), model) == whole
    assert measured == [PATHS[i] for i in (0, 1)]
    assert _measure(tiny(), model) == whole and len(measured) == 2, "all of it is in the file"
    measured_losses(tiny(), PATHS[:1], 64, ROWS, mx.float32, model, lambda _: None)
    measured_losses(tiny(), PATHS[:1], 32, ROWS[:1], mx.float32, model, lambda _: None)
    assert len(list(cache.iterdir())) == 3, "another format or text is another file"


def test_without_room_for_the_dense_model_the_others_are_in_eight_bits(
    tiny: TinyModels, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = _measure(tiny(), load(tiny()).model)
    held: list[bool] = []
    honest: Callable[..., float] = sensitivity._mean_kl

    def watched(original: Any, partial: Any, rows_NT: mx.array) -> float:
        modules = dict(leaves(partial._model))
        held.append(sum("scales" not in one for one in modules.values() if "weight" in one) > 8)
        return honest(original, partial, rows_NT)

    monkeypatch.setattr(sensitivity, "_mean_kl", watched)
    beside = _measure(tiny(), None)
    assert not any(held), "one layer is dense (and seven norms)"
    for path in PATHS:
        assert beside[path][2] == pytest.approx(dense[path][2], rel=0.05)
    monkeypatch.setattr(sensitivity, "device_memory", lambda: 1000)
    with pytest.raises(ResourceError, match="in 8 bits") as caught:
        measured_losses(tiny(), PATHS, 32, ROWS[:1], mx.float32, None, lambda _: None)
    assert "--sensitivity rules" in caught.value.hint


def test_a_damaged_layer_is_named(tiny: TinyModels) -> None:
    model = load(tiny()).model
    module = dict(leaves(model))[PATHS[0]]
    model.update_modules(tree_unflatten([(PATHS[0], module)]))
    module["weight"] = module["weight"] * float("nan")
    with pytest.raises(SlimError, match=r"mlp\.down_proj in fewer bits is not finite"):
        _measure(tiny(), model, PATHS[:1])
