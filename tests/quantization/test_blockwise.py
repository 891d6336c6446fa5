"""Block-wise training: below rounding at equal bytes, one block in memory, exact gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_slim.config.schema import QuantizeConfig
from mlx_slim.errors import ResourceError, SlimError
from mlx_slim.models.fidelity import compare
from mlx_slim.models.logits import kl_divergence
from mlx_slim.models.opening import open_weights
from mlx_slim.quantization import blockwise, scale_training
from mlx_slim.quantization.apply import quantize_model
from mlx_slim.quantization.block_rows import Training
from mlx_slim.quantization.blockwise import quantize_blockwise
from mlx_slim.quantization.fake import CONSTANTS
from mlx_slim.quantization.methods import quantize_with
from mlx_slim.quantization.policy import embed_formats, leaves
from mlx_slim.runtime import to_float
from tests.quantization.test_loading import held
from tests.support.memory import peak_of
from tests.support.tiny import TinyModels, tiny_model

TOKENS = mx.random.randint(0, 256, (10, 16), key=mx.random.key(0)).astype(mx.int32)
SEEN, UNSEEN = TOKENS[:8], TOKENS[8:]
MANY = mx.random.randint(0, 256, (16, 32), key=mx.random.key(1)).astype(mx.int32)
TWO = QuantizeConfig(bits=2, group_size=32)
SHORT = Training(epochs=3, end_epochs=2)


def _opened(folder: Path) -> tuple[Any, dict[str, Any]]:
    model, config, _ = open_weights(folder, dtype=mx.float32)
    return model.eval(), config


def _trained(folder: Path, training: Training = SHORT, **changes: Any) -> tuple[Any, Any]:
    model, config = _opened(folder)
    settings: dict[str, Any] = {"stored": mx.float16, "embed_bits": 6, **changes}
    rows = settings.pop("rows", SEEN)
    return model, quantize_blockwise(model, config, TWO, rows, training=training, **settings)


@pytest.mark.parametrize("architecture", ["llama-tied", "qwen3_moe"])
def test_nearer_to_the_original_than_other_methods_of_as_many_bytes(
    tiny: TinyModels, architecture: str
) -> None:
    folder = tiny(architecture)
    original, _ = _opened(folder)
    model, report = _trained(folder, Training(epochs=2, end_epochs=1), rows=MANY)
    assert not tree_flatten(model.trainable_parameters())
    ours = compare(original, model, UNSEEN).kl
    others, sizes = [], []
    for method in ("rtn", "gptq", "dwq"):
        other, config = _opened(folder)
        if method == "rtn":
            result = quantize_model(other, config, TWO, None, embed_formats(other, TWO, 6))
        else:
            result = quantize_with(other, config, TWO, method, MANY, 6)
        sizes.append(result.bytes_after)
        others.append(compare(original, other, UNSEEN).kl)
    assert ours < 0.9 * others[0] and ours < min(others), others
    assert report.bytes_after == sizes[0] == sizes[2]
    assert "2-bit affine, group 32" in report.quantized
    assert all("norm" in skip.reason for skip in report.skipped)


def test_the_second_phase_lowers_the_divergence_and_leaves_codes(tiny: TinyModels) -> None:
    folder = tiny("llama")
    original, _ = _opened(folder)
    first, _ = _trained(folder, Training(epochs=1, end_epochs=0))
    both, _ = _trained(folder, Training(epochs=1, end_epochs=4))
    assert compare(original, both, SEEN).kl < compare(original, first, SEEN).kl
    before, after = (dict(tree_flatten(model.parameters())) for model in (first, both))
    for name, value in before.items():
        changed = not mx.array_equal(value, after[name]).item()
        assert changed == (name.rsplit(".", 1)[-1] in CONSTANTS), name
        if changed:  # rounded as they will be stored
            stored = after[name].astype(mx.float16).astype(mx.float32)
            assert mx.array_equal(stored, after[name]).item()


def test_gradients_block_by_block_are_those_of_the_whole(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny("llama-tied")
    original, _ = _opened(folder)
    collected: dict[int, Any] = {}
    monkeypatch.setattr(
        scale_training.Constants,
        "step",
        lambda self, gradients: (
            collected.update({id(self): (self, gradients)}),
            self.put(self.values),
        ),
    )
    model, _ = _trained(folder, Training(epochs=0, end_epochs=1, batch=8), stored=mx.float32)
    layers = {path: one for path, one in leaves(model) if "scales" in one}
    for layer in layers.values():
        layer.unfreeze(keys=list(CONSTANTS), recurse=False)

    def loss(model: Any) -> mx.array:
        target, output = (f(SEEN).reshape(-1, original.args.vocab_size) for f in (original, model))
        return kl_divergence(target, output).sum()

    _, whole = nn.value_and_grad(model, loss)(model)
    expected = dict(tree_flatten(whole))
    ours = {
        id(layer): (gradients[path], owner.units[path])
        for owner, gradients in collected.values()
        for path, layer in owner.layers.items()
    }
    assert len(ours) == len(layers) == len(expected) / 2
    for path, layer in layers.items():
        gradients, unit = ours[id(layer)]
        for name in CONSTANTS:
            theirs = expected[f"{path}.{name}"] * unit  # pyright: ignore
            gap = mx.abs(gradients[name] - theirs).max()
            assert gap <= 2e-5 * mx.abs(theirs).max() + 1e-9, (path, name)


@pytest.mark.parametrize("end_epochs", [0, 1])
def test_one_block_is_in_memory(tmp_path: Path, end_epochs: int) -> None:
    """128 × 512 wide, 10 blocks or 2: what grows is what is packed."""
    shape: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 512}
    training = Training(epochs=1, end_epochs=end_epochs, batch=2)
    rows = SEEN[:2]
    peaks, sizes = [], []
    for count in (2, 8):
        folder = tiny_model(tmp_path / str(count), num_hidden_layers=count, **shape)
        (model, _), peak = peak_of(lambda folder=folder: _trained(folder, training, rows=rows))
        peaks.append(peak)
        sizes.append(held(model))
        block = held(model.layers[0])
    dense = 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 512)
    assert block < dense / 7  # packed: 2 bits, and constants in float32 as a CPU computes
    grown = peaks[1] - peaks[0] - (sizes[1] - sizes[0])
    # What a block more adds: hidden states of the second phase and moments of its constants.
    extra = end_epochs * (4 * rows.size * 128 + 3 * 2 * 4 * dense // 4 // 32)
    assert grown < 6 * extra + dense / 2, (grown, dense)


def test_the_same_twice(tiny: TinyModels) -> None:
    one, other = (
        dict(
            tree_flatten(_trained(tiny("llama"), Training(epochs=1, end_epochs=1))[0].parameters())
        )
        for _ in range(2)
    )
    assert all(mx.array_equal(one[name], other[name]).item() for name in one)


def test_what_judges_hears_the_original(tiny: TinyModels) -> None:
    original, _ = _opened(tiny("llama"))
    heard: list[mx.array] = []

    def judge(logits: blockwise.Logits) -> None:
        heard.extend(logits(row[None]) for row in UNSEEN)
        mx.eval(heard)

    _trained(tiny("llama"), Training(epochs=0, end_epochs=0), judged_NT=UNSEEN, judge=judge)
    for row, logits in zip(UNSEEN, heard, strict=True):
        expected = original(row[None])
        assert mx.abs(logits - expected).max() < 1e-5 * mx.abs(expected).max()


def test_refusals(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = _opened(tiny("llama"))
    norm = model.layers[1].input_layernorm
    norm["weight"] = mx.full(norm["weight"].shape, mx.nan)
    with pytest.raises(SlimError, match="error of block 1 is not finite"):
        quantize_blockwise(model, config, TWO, SEEN[:2], stored=mx.float32)
    monkeypatch.setattr(blockwise, "device_memory", lambda: 1000)
    with pytest.raises(ResourceError, match="training one block takes"):
        quantize_blockwise(*_opened(tiny("llama")), TWO, SEEN, stored=mx.float32)


def test_massive_tokens_do_not_decide_alone() -> None:
    target = mx.ones((1, 2, 4)) * mx.array([1.0, 1000.0])[None, :, None]
    one = to_float(blockwise._error(target * 1.1, target))
    assert one == pytest.approx(0.02, rel=1e-4)
