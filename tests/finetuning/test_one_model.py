"""No command holds two models: MLX's own peak from its start, or from the end of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_slim.export.fuse import FuseOptions, fuse
from mlx_slim.export.model import export_gguf, export_hf
from mlx_slim.export.options import Mode
from mlx_slim.finetuning import run as module
from mlx_slim.finetuning.run import finetune
from mlx_slim.models import fidelity
from mlx_slim.models.load import load
from mlx_slim.models.recorded_logits import RecordedLogits, free_weights
from mlx_slim.planner.shapes import leaves
from mlx_slim.pruning import report as prune_report
from tests.support.adapters import write_adapter, write_quantized
from tests.support.memory import reset_peak
from tests.support.runs import Recorder, recipe, write_rows
from tests.support.tiny import tiny_model

# 3.9 million weights in 16 blocks: no tensor is more than 2% of the model.
SHAPE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 16}
# Besides one model, as a fraction of it in float32: activations, one row's logits, a few tensors of
# one layer, which are float32 on a GPU too.
SLACK = 0.35


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("dense") / "m", dtype=mx.bfloat16, **SHAPE)


@pytest.fixture
def size(dense: Path, device: str) -> int:
    """Bytes of the model in what it is computed in: float32 on a CPU, as stored on a GPU."""
    return (1 if device == "gpu" else 2) * _stored(dense)


@pytest.fixture
def wide(dense: Path) -> int:
    """Bytes of the model in float32."""
    return 2 * _stored(dense)


def _stored(dense: Path) -> int:
    return sum(value.nbytes for _, value in leaves(load(dense).model))


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "notes.txt"
    path.write_text("\n".join(f"{i}: a line of plain words to look at" for i in range(90)))
    return str(path)


@pytest.fixture
def peak(device: str) -> Callable[[], int]:
    """Return the most that MLX held since the test began, besides what was there before."""
    before = reset_peak()
    return lambda: mx.get_peak_memory() - before


# A GPU's path reads the same blocks; prune and quantize are in ``models/test_streamed.py``.
@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize("mode", ["merge", "keep", "dequantize", "requantize"])
def test_fuse(
    dense: Path,
    size: int,
    wide: int,
    text: str,
    peak: Callable[[], int],
    tmp_path: Path,
    mode: Mode,
) -> None:
    quantized = mode in ("dequantize", "requantize")
    base = write_quantized(tmp_path / "q", dense, 4) if quantized else dense
    # Layers without an adapter become dense too: with a quantized base all but these.
    targets = ["q_proj"] if quantized else ["all-linear"]
    adapter = write_adapter(tmp_path / "a", base, targets=targets)
    mx.reset_peak_memory()
    options = FuseOptions(mode=mode, calibration=text, length=32, force=quantized)
    fuse(base, adapter, tmp_path / "f", options)
    assert peak() < (0.5 * wide if mode == "requantize" else size + SLACK * wide)


def test_export(
    dense: Path, size: int, wide: int, text: str, peak: Callable[[], int], tmp_path: Path
) -> None:
    export_hf(dense, tmp_path / "hf")
    assert peak() < size + SLACK * wide
    export_gguf(dense, tmp_path / "gguf", kind="q8_0", calibration=text)
    assert peak() < size + SLACK * wide


def test_the_report_of_a_pruned_model(
    dense: Path, size: int, wide: int, peak: Callable[[], int], tmp_path: Path
) -> None:
    one = prune_report._Candidate(str(dense))
    models: dict[str, prune_report._Candidate] = dict.fromkeys(
        ("original", "pruned", "recovered"), one
    )
    figures = prune_report._compare(models, mx.arange(64).reshape(2, 32), tmp_path)
    assert figures.keys() == models.keys()
    assert all(each.kl == 0 and each.top1 == 1 for each in figures.values())
    assert peak() < size + SLACK * wide


@pytest.mark.parametrize("method", ["lora", "full", "qlora"])
def test_the_end_of_a_fine_tune(
    dense: Path,
    size: int,
    wide: int,
    peak: Callable[[], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    best_weights = module._best_weights

    def from_here(*words: Any):  # the first thing that is done once the last step is over
        held.append(mx.get_active_memory())
        mx.reset_peak_memory()
        best_weights(*words)

    held: list[int] = []
    monkeypatch.setattr(module, "_best_weights", from_here)
    before = mx.get_active_memory()
    resolved = recipe(dense, write_rows(tmp_path / "rows.jsonl"), method, steps=2)
    finetune(resolved, tmp_path / "run", observer=Recorder())
    assert held[0] - before < size + 0.15 * wide, "the optimizer is still there"
    assert peak() < (0.5 * wide if method == "qlora" else size + SLACK * wide)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_a_recording_answers_as_the_model_does(
    dense: Path, dtype: mx.Dtype, tmp_path: Path
) -> None:
    model, other = (load(dense, dtype=kind).model for kind in (dtype, mx.float32))
    other.update({"lm_head": {"weight": other["lm_head"]["weight"] * 1.1}})
    tokens_NT = mx.random.randint(0, 260, (3, 70))
    expected = fidelity.compare(model, other, tokens_NT)
    before = set(tmp_path.iterdir())
    recorded = RecordedLogits(model, tokens_NT, tmp_path / "not" / "there")
    assert set(tmp_path.iterdir()) == before, "the file has no name"
    logits = model(tokens_NT[1:2])
    free_weights(model)
    assert not any(value.size for _, value in leaves(model))
    assert recorded(tokens_NT[1:2]).dtype == dtype
    assert mx.array_equal(recorded(tokens_NT[1:2]), logits).item()
    assert fidelity.compare(recorded, other, tokens_NT) == expected
