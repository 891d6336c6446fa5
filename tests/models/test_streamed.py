"""A model read a block at a time: what it answers, what it holds, what the commands hold with it.

The model of these tests has 24 blocks of width 256: 3.1 MB each in float32, 75 MB in all.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwiGLU, SwitchGLU

from mlx_slim.adapters.stack import Weighted
from mlx_slim.config.schema import QuantizeConfig
from mlx_slim.errors import ResourceError, SlimError
from mlx_slim.export.folding import with_adapters
from mlx_slim.export.fuse import FuseOptions, fuse
from mlx_slim.models import structure
from mlx_slim.models.load import load
from mlx_slim.models.streamed import Walk, answers_of, count_of_blocks, unread
from mlx_slim.pruning import run as pruning
from mlx_slim.pruning.run import PruneOptions, prune
from mlx_slim.quantization import run as quantization
from mlx_slim.quantization.run import CompressOptions, compress
from tests.support.adapters import write_adapter
from tests.support.memory import peak_of
from tests.support.tiny import ARCHITECTURES, TinyModels, tiny_model

DEEP: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
}
ROWS = mx.array(np.random.default_rng(3).integers(0, 250, (3, 24)))
# What the rows of a batch compute at one time in a block: at most six arrays of the MLP's width.
TOKENS = 128
ACTIVATIONS = 6 * TOKENS * 768 * 4


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose blocks are nearly all of it."""
    folder = tmp_path_factory.mktemp("deep")
    (folder / "text.txt").write_text("\n".join(f"{i}: a line of plain words" for i in range(60)))
    return tiny_model(folder / "model", dtype=mx.bfloat16, **DEEP)


def bound(folder: Path) -> int:
    """Return the bytes of two blocks in float32 and of the largest tensor."""
    model = unread(folder, dtype=mx.float32).open()
    block = sum(value.nbytes for _, value in _flat(structure.blocks(model)[0]))
    return 2 * block + max(value.nbytes for _, value in _flat(model)) + ACTIVATIONS


def _flat(module: Any) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    return tree_flatten(module.parameters())  # type: ignore[return-value]


@pytest.mark.parametrize("architecture", [*sorted(ARCHITECTURES), "mixtral"])
def test_rows_meet_what_the_whole_model_computes(tiny: TinyModels, architecture: str) -> None:
    model = load(tiny(architecture), dtype=mx.float32).model
    read = unread(tiny(architecture), dtype=mx.float32)
    logits = answers_of(read.open, ROWS, "reading")
    for row_T in ROWS:
        assert mx.array_equal(logits(row_T[None]), model(row_T[None]))  # type: ignore[operator]
    in_memory = answers_of(model, ROWS, "reading")
    assert mx.array_equal(in_memory(ROWS[:1]), logits(ROWS[:1]))
    assert mx.array_equal(model(ROWS[:1]), logits(ROWS[:1])), "it keeps its weights"  # type: ignore[operator]
    assert count_of_blocks(read.open) == count_of_blocks(model) == 3
    assert type(SwitchGLU(8, 8, 2).activation) is SwiGLU  # mlx-lm's, that all mixtures share


def test_a_block_is_freed_before_the_next_is_read(deep: Path) -> None:
    read = unread(deep, dtype=mx.float32)
    _, peak = peak_of(lambda: answers_of(read.open, ROWS, "reading")(ROWS[:1]))
    assert peak <= bound(deep)
    walk = Walk(read.open, [ROWS])
    sizes = [
        (len(list(walk.passed(index))), sum(value.size for _, value in _flat(block)) > 0)
        for index, block in walk.blocks("reading")
    ]
    assert sizes == [(1, True)] * 24
    assert not any(value.size for _, value in _flat(walk.model))


def test_a_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    for name in ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"):
        folder = tiny_model(tmp_path / name, "llama", shards=1)
        file = next(folder.glob("*.safetensors"))
        tensors: dict[str, mx.array] = dict(mx.load(str(file)))  # type: ignore[arg-type]
        tensors[name][0, 0] = float("nan")
        mx.eval(tensors)
        mx.save_safetensors(str(file), tensors)
        with pytest.raises(SlimError, match=f"x: NaN or infinity in {name}"):
            answers_of(unread(folder).open, ROWS, "reading", "x")


def _quantize(source: Path, out: Path, text: str) -> int:
    quantize = QuantizeConfig(group_size=32)
    options = CompressOptions(quantize, calibration=text, length=32, fidelity_samples=2)
    result = compress(source, out, options)
    assert result.fidelity is not None
    return result.peak_memory_bytes


def _prune(source: Path, out: Path, text: str, **how: Any) -> int:
    options = PruneOptions(calibration=text, samples=4, length=32, held_out=64, **how)
    record = prune(source, out, options).details
    assert record.fidelity is not None
    return record.peak_memory_bytes


def _prune_depth(source: Path, out: Path, text: str) -> int:
    return _prune(source, out, text, method="block-influence", ratio=0.25)


def _prune_by_weight(source: Path, out: Path, text: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning, "VALIDATION_LENGTH", TOKENS)  # where no rows are calibrated on
        return _prune(source, out, text, method="l2", ratio=0.5, hidden=True)


def _prune_by_activation(source: Path, out: Path, text: str) -> int:
    return _prune(source, out, text, method="activation", ratio=0.5)


def _fuse(source: Path, out: Path, text: str) -> int:
    adapter = out.with_name(f"{out.name}-adapter")
    if not adapter.exists():
        write_adapter(adapter, source, targets=["q_proj", "down_proj"])
    mx.clear_cache()
    options = FuseOptions(calibration=text, samples=2, length=32, dtype="float32")
    return peak_of(lambda: fuse(source, adapter, out, options))[1]


def test_adapters_leave_the_base_unread(tiny: TinyModels, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", tiny())
    read = unread(tiny())
    (_, injected), peak = peak_of(lambda: with_adapters(read, [Weighted(adapter)]))
    largest = max(value.nbytes for _, value in _flat(read.open()))
    assert peak <= 4 * injected.parameters + largest + (1 << 16)


COMMANDS = [_quantize, _prune_depth, _prune_by_weight, _prune_by_activation, _fuse]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_hold_two_blocks_and_the_largest_tensor(
    deep: Path, tmp_path: Path, command: Callable[[Path, Path, str], int]
) -> None:
    text = str(deep.parent / "text.txt")
    peak = command(deep, tmp_path / "a", text)
    whole = 4 * sum(value.size for _, value in _flat(unread(deep).open()))
    assert peak <= bound(deep) < 0.2 * whole


@pytest.mark.parametrize("command", COMMANDS)
def test_a_head_larger_than_a_block_is_held_once(
    tmp_path: Path, command: Callable[[Path, Path, str], int]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{i}: a line of plain words" for i in range(60)))
    shape = {"hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 4}
    shape |= {"vocab_size": 8192, "tie_word_embeddings": False}
    folder = tiny_model(tmp_path / "model", dtype=mx.bfloat16, **{**DEEP, **shape})
    logits = 8 * TOKENS // 2 * 8192 * 4  # of one row of both models, and what they are compared by
    assert command(folder, tmp_path / "a", str(text)) <= bound(folder) + logits


def test_nothing_of_a_walk_waits_for_the_garbage_collector(deep: Path) -> None:
    read = unread(deep, dtype=mx.float32)
    before = mx.get_active_memory()
    gc.disable()
    try:
        logits = answers_of(read.open, ROWS, "reading")
        assert mx.get_active_memory() - before <= 2 * ROWS.size * 256 * 4  # hidden states
        mx.eval(logits(ROWS[:1]))
        del logits
        assert mx.get_active_memory() - before <= ROWS.size * 256 * 4
    finally:
        gc.enable()


@pytest.mark.parametrize("method", ["awq", "gptq", "dwq", "dynamic"])
def test_a_method_that_holds_the_model_is_refused_where_it_does_not_fit(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(quantization, "device_memory", lambda: 200_000)
    options = CompressOptions(QuantizeConfig(group_size=32), method=method)
    with pytest.raises(ResourceError, match=f"method {method} holds the whole model") as caught:
        compress(tiny(), tmp_path / "out", options)
    assert caught.value.exit_code == 3 and "--method rtn" in caught.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("how", "fits"),
    [
        ({"method": "taylor", "ratio": 0.5}, "l2 or activation"),
        ({"method": "perplexity", "ratio": 0.5}, "block-influence"),
        ({"method": "l2", "ratio": 0.5, "compensate": True}, "leave it out"),
    ],
)
def test_a_pruning_that_holds_the_model_is_refused_where_it_does_not_fit(
    tiny: TinyModels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: dict[str, Any],
    fits: str,
) -> None:
    monkeypatch.setattr(pruning, "device_memory", lambda: 200_000)
    options = PruneOptions(**how)
    with pytest.raises(ResourceError, match="holds the whole model") as caught:
        prune(tiny(), tmp_path / "out", options)
    assert caught.value.exit_code == 3 and fits in caught.value.hint
    assert not list(tmp_path.iterdir())
