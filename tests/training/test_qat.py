"""Quantization-aware training computes with the quantized model, and trains the float one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
from mlx.utils import tree_unflatten

from mlx_slim.adapters.inject import inject
from mlx_slim.adapters.merge import merge
from mlx_slim.config.schema import AdapterConfig, QuantizeConfig
from mlx_slim.data.batches import collate
from mlx_slim.models import structure
from mlx_slim.models.load import Loaded, load
from mlx_slim.models.quantized import LayerFormat
from mlx_slim.planner.shapes import leaves
from mlx_slim.quantization.apply import quantize_model, rounded
from mlx_slim.quantization.policy import make_policy
from mlx_slim.training.cross_entropy import CrossEntropy
from mlx_slim.training.grad_checkpoint import checkpointed
from mlx_slim.training.optim import trainable
from mlx_slim.training.qat import FakeQuantizer
from mlx_slim.training.step import Stepper
from tests.adapters.support import IDS, relative_error, shake
from tests.support.rows import MemoryRows
from tests.support.tiny import TinyModels

ROWS = MemoryRows([5, 9, 17, 3, 30, 12, 2, 25])
BATCHES = [[[0], [1], [2], [3]], [[4], [5], [6], [7]]]
THREE = QuantizeConfig(bits=3, group_size=32)


def qat_model(
    folder: Path, method: str, config: QuantizeConfig = THREE, **settings: Any
) -> tuple[Loaded, FakeQuantizer]:
    """Return (model, its rounding) for a method, adapters moved away from their start."""
    loaded = load(folder)
    chosen = make_policy(loaded.model, config).chosen
    if method == "full":
        loaded.model.unfreeze()
    else:
        mx.random.seed(1)
        targets = settings.pop("targets", "all-linear")
        inject(
            loaded.model,
            AdapterConfig(rank=4, targets=targets, **settings),
            dora=method == "dora",
        )
        shake(loaded.model)
    return loaded, FakeQuantizer(loaded.model, chosen, mx.float32)


CASES = [
    ("llama", "full", {}),
    ("llama-tied", "full", {}),
    ("phi", "full", {}),
    ("llama", "lora", {}),
    ("phi", "lora", {"targets": ["q_proj", "fc1"]}),
    ("llama-tied", "lora", {"targets": ["all-linear", "embed_tokens"]}),
    ("llama", "lora", {"init": "pissa"}),
    ("qwen2", "dora", {}),
]


@pytest.mark.parametrize(("architecture", "method", "settings"), CASES)
@pytest.mark.parametrize("bits", [2, 4])
def test_what_it_computes_is_the_quantized_model(
    tiny: TinyModels, architecture: str, method: str, settings: dict[str, Any], bits: int
) -> None:
    config = QuantizeConfig.model_validate({"bits": bits, "group_size": 32})
    loaded, rounding = qat_model(tiny(architecture), method, config, **settings)
    model = loaded.model
    before = {k: mx.array(v) for k, v in leaves(model)}
    plain = model(IDS)
    with rounding.computing():
        ours = model(IDS)
        mx.eval(ours)
    after = dict(leaves(model))
    assert all(mx.array_equal(before[name], after[name]) for name in before)
    assert mx.allclose(model(IDS), plain, rtol=1e-6, atol=1e-6)
    merge(model)
    quantize_model(model, loaded.config, config)
    assert relative_error(ours, model(IDS)) < 1e-5
    assert relative_error(ours, plain) > 1e-2


def test_other_formats_and_16_bit_scales() -> None:
    mx.random.seed(0)
    weight = mx.random.normal((8, 64))
    for mode, bits, group in (("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)):
        chosen = LayerFormat(group, bits, mode)
        settings = asdict(chosen)
        codes, scales, *_ = mx.quantize(weight, **settings)
        expected = mx.dequantize(codes, scales, **settings).astype(mx.float32)
        assert mx.array_equal(rounded(weight, mx.bfloat16, chosen), expected)
    codes, scales, biases = mx.quantize(weight, group_size=32, bits=3)
    halves = [x.astype(mx.bfloat16).astype(mx.float32) for x in (scales, biases)]
    expected = mx.dequantize(codes, *halves, group_size=32, bits=3)
    ours = rounded(weight, mx.bfloat16, LayerFormat(32, 3))
    assert mx.allclose(ours, expected, atol=1e-6)
    assert not mx.allclose(ours, mx.dequantize(codes, scales, biases, group_size=32, bits=3))


def _straight_through(
    folder: Path, method: str, batches: Sequence[Sequence[Sequence[int]]], **settings: Any
) -> dict[str, mx.array]:
    """The slow way: w + stop_gradient(dequantize(quantize(w)) − w) in every layer, full logits."""
    loaded, _ = qat_model(folder, method, **settings)
    model = loaded.model
    chosen = make_policy(load(folder).model, THREE).chosen

    def fake(weight: mx.array) -> mx.array:
        codes, scales, biases = mx.quantize(weight, group_size=32, bits=3)
        value = mx.dequantize(codes, scales, biases, group_size=32, bits=3)
        return weight + mx.stop_gradient(value - weight)

    names = dict(model.named_modules())
    plain = load(folder).model
    places = dict(plain.named_modules())

    def loss(
        parameters: dict[str, mx.array], tokens: mx.array, positions: mx.array, targets: mx.array
    ):
        model.update(tree_unflatten(list(parameters.items())))
        for path in chosen:
            module = names[path]
            full = module.merged_weight() if hasattr(module, "base") else module["weight"]
            places[path]["weight"] = fake(full)
        for name, value in parameters.items():
            parent, leaf = name.rsplit(".", 1)
            if parent in places and (parent not in chosen or leaf == "bias"):
                places[parent][leaf] = value
        logits = plain(tokens).reshape(-1, plain(tokens).shape[-1])[positions]
        picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return (mx.logsumexp(logits, axis=-1) - picked).sum()

    total: dict[str, mx.array] = {}
    count = 0
    for groups in batches:
        for group in groups:
            batch = collate(ROWS, [group], isolate=False)
            arrays = [mx.array(x) for x in (batch.tokens_BT, batch.positions_N, batch.targets_N)]
            parameters = trainable(model)
            gradients = mx.grad(loss)(parameters, *arrays)
            model.update(tree_unflatten(list(parameters.items())))
            mx.eval(gradients)
            total = {k: v + total[k] if k in total else v for k, v in gradients.items()}
            count += batch.supervised_tokens
    return {k: v / count for k, v in total.items()}


TIED = ("llama-tied", "lora", {"targets": ["all-linear", "embed_tokens"]})


@pytest.mark.parametrize(
    ("architecture", "method", "settings", "way"),
    [
        ("llama-tied", "full", {}, {}),
        ("llama-tied", "full", {}, {"checkpoint": True}),
        ("phi", "full", {}, {}),
        (*TIED, {}),
        (*TIED, {"num_threads": 2, "checkpoint": True}),
        ("llama", "dora", {}, {"num_threads": 2}),
        ("llama", "dora", {}, {"checkpoint": True}),
        ("llama", "dora", {}, {"compiled": True}),
    ],
)
def test_gradients_are_the_straight_through_ones(
    tiny: TinyModels, architecture: str, method: str, settings: dict[str, Any], way: dict[str, Any]
) -> None:
    expected = _straight_through(tiny(architecture), method, BATCHES, **settings)
    loaded, rounding = qat_model(tiny(architecture), method, **settings)
    model = loaded.model
    settings = {key: value for key, value in way.items() if key != "checkpoint"}
    objective = CrossEntropy(model, chunk=16)
    stepper = Stepper(model, objective, captured=rounding.captured(), **settings)
    with checkpointed(structure.blocks(model), "checkpoint" in way):
        for factor in (1.3, 1.0):  # a compiled step must not keep the weights of its first call
            parameters = trainable(model)
            model.update(tree_unflatten([(k, v * factor) for k, v in parameters.items()]))
            with rounding.computing():
                result = stepper.step(collate(ROWS, g, isolate=False) for g in BATCHES)
            model.update(tree_unflatten(list(parameters.items())))
    for path, value in expected.items():
        if path.endswith(".m"):
            continue  # see the next test
        assert relative_error(result.gradients[path], value) < 1e-3, path


def test_doras_lengths_get_the_derivative_of_the_rounded_loss(tiny: TinyModels) -> None:
    loaded, rounding = qat_model(tiny("llama"), "dora")
    model, objective = loaded.model, CrossEntropy(loaded.model, chunk=16)
    batch = collate(ROWS, BATCHES[1], isolate=False)
    adapter = cast(Any, model).layers[1].mlp.up_proj
    m_O = adapter.m
    with rounding.computing():
        result = Stepper(model, objective).step([batch])
    derivative = (result.gradients["model.layers.1.mlp.up_proj.m"] * m_O).sum().item()

    def loss(factor: float) -> float:
        adapter.m = m_O * factor
        with rounding.computing():
            return Stepper(model, objective).step([batch]).loss

    assert (loss(1.01) - loss(0.99)) / 0.02 == pytest.approx(derivative, rel=0.02)
