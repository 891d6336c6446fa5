"""A block at a time, with NumPy between its pieces: loss and gradients of the one graph."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_slim.adapters.inject import inject
from mlx_slim.config.adapter import AdapterConfig
from mlx_slim.data.collate import Batch, collate
from mlx_slim.distillation.losses import DistillationLoss
from mlx_slim.distillation.objective import DistillationObjective
from mlx_slim.models import structure
from mlx_slim.models.activations import use_fast_swiglu
from mlx_slim.runtime import to_float
from mlx_slim.training.blockwise import Blockwise, why_not
from mlx_slim.training.cross_entropy import CrossEntropy
from mlx_slim.training.grad_checkpoint import checkpointed
from mlx_slim.training.step import Stepper
from mlx_slim.training.step_result import StepResult
from tests.adapters.support import shake, stock_model
from tests.support.rows import MemoryRows
from tests.support.tiny import TinyModels
from tests.training.test_prefix_sharing import batch_of

ROWS = MemoryRows([5, 9, 17, 3, 140, 12, 2, 25])
ARCHITECTURES = ["llama", "llama-tied", "llama-mha", "mistral", "qwen2", "qwen3"]


def batches(name: str) -> list[Batch]:
    if name == "packed":
        return [collate(ROWS, [[0, 4], [1, 2, 3], [5, 6, 7]], isolate=True)]
    if name in ("nested", "weighted"):
        return [batch_of("nested", weighted=name == "weighted")]
    plans = [[0], [1], [2], [3]], [[4], [5]]
    return [collate(ROWS, plan, isolate=False) for plan in plans]


def model_of(folder: Path, method: str, **adapter: Any) -> nn.Module:
    model = stock_model(folder, bits=4 if method == "qlora" else None)
    use_fast_swiglu(model)
    if method != "full":
        config = AdapterConfig(**{"rank": 4, "targets": "all-linear", **adapter})
        inject(model, config, dora=method == "dora")
        shake(model)
    return model.eval()


def step(
    objective: CrossEntropy,
    model: nn.Module,
    rows: list[Batch],
    monkeypatch: pytest.MonkeyPatch,
    *,
    whole: bool,
    **named: Any,
) -> StepResult:
    """One step in training mode; ``whole``: as one graph."""
    stepper = Stepper(model, objective, **named)
    model.train()
    mx.random.seed(3)
    try:
        with monkeypatch.context() as patch:
            if whole:
                patch.setattr(Blockwise, "fits", lambda self: False)
            else:  # the one graph is not even built
                patch.setattr(stepper, "_value_and_grad", None)
            return stepper.step(rows)
    finally:
        model.eval()


def differing(ours: StepResult, plain: StepResult) -> list[str]:
    """What differs: tokens, loss (2e-6), metrics (1e-5), gradients (2e-5 of the largest)."""
    different = []
    if ours.supervised != plain.supervised:
        different.append("supervised tokens")
    if ours.loss != pytest.approx(plain.loss, rel=2e-6):
        different.append("loss")
    if ours.metrics != pytest.approx(plain.metrics, rel=1e-5):
        different.append("metrics")
    different += set(ours.gradients) ^ set(plain.gradients)
    for path, value in plain.gradients.items():
        scale = to_float(mx.abs(value).max()) + 1e-6
        if not to_float(mx.abs(ours.gradients[path] - value).max()) < 2e-5 * scale + 1e-7:
            different.append(path)
    return different


def both(
    objective: CrossEntropy,
    model: nn.Module,
    rows: list[Batch],
    monkeypatch: pytest.MonkeyPatch,
    **named: Any,
) -> tuple[StepResult, StepResult]:
    """One step in pieces, and as one graph."""
    return (
        step(objective, model, rows, monkeypatch, whole=False, **named),
        step(objective, model, rows, monkeypatch, whole=True, **named),
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_families(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, architecture: str, method: str
) -> None:
    model = model_of(tiny(architecture), method)
    assert not differing(
        *both(CrossEntropy(model, chunk=16), model, batches("grouped"), monkeypatch)
    )


@pytest.mark.parametrize("method", ["lora", "dora", "qlora"])
@pytest.mark.parametrize("name", ["grouped", "packed", "nested"])
@pytest.mark.parametrize("threads", [1, 2])
def test_methods_with_dropout_have_the_masks_of_the_one_graph(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, method: str, name: str, threads: int
) -> None:
    model = model_of(tiny("llama"), method, dropout=0.2)
    objective, rows = CrossEntropy(model, chunk=16, num_threads=threads), batches(name)
    named = {"num_threads": threads, "prefix_sharing": name == "nested"}
    ours, plain = both(objective, model, rows, monkeypatch, **named)
    assert not differing(ours, plain)
    again = step(objective, model, rows, monkeypatch, whole=False, **named)
    assert again.loss == ours.loss
    assert all(mx.array_equal(again.gradients[k], v) for k, v in ours.gradients.items())


@pytest.mark.parametrize(
    "adapter",
    [{"layers": 1}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}],
    ids=["the last block", "the head", "the embedding"],
)
def test_what_is_trained_besides_the_blocks(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, adapter: dict[str, Any]
) -> None:
    model = model_of(tiny("llama"), "lora", **adapter)
    assert not differing(
        *both(CrossEntropy(model, chunk=16), model, batches("weighted"), monkeypatch)
    )


class Targets:
    """A teacher's targets: 3 of its tokens, and the rest."""

    def columns(self, sources_N: np.ndarray) -> tuple[mx.array, mx.array, mx.array]:
        rng = np.random.default_rng(5)
        logs = np.log(rng.dirichlet(np.ones(4), len(sources_N))).astype(np.float32)
        ids = np.array([rng.permutation(256)[:3] for _ in sources_N])
        return mx.array(ids), mx.array(logs[:, :3]), mx.array(logs[:, 3])


def test_a_teacher(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(tiny("llama"), "lora")
    loss = DistillationLoss("forward", 1.0, 0.5, (1.0,))
    objective = DistillationObjective(loss, [Targets()], model, chunk=16)
    assert not differing(*both(objective, model, batches("grouped"), monkeypatch))


def test_models_that_keep_the_one_graph(tiny: TinyModels) -> None:
    def reason(architecture: str, fast: bool = True) -> str:
        model = stock_model(tiny(architecture))
        if fast:
            use_fast_swiglu(model)
        return why_not(model, structure.split(model))

    assert not reason("llama")
    assert reason("llama", fast=False) == "its MLP is no SwiGLU"
    assert reason("phi") == "its blocks are others"
    assert reason("gemma3_text") == "its blocks are others"
    model = model_of(tiny("llama"), "full")
    assert why_not(model, None) == "it does not split into body and head"
    half = stock_model(tiny("llama"))
    half.set_dtype(mx.float16)
    use_fast_swiglu(half)
    assert why_not(half, structure.split(half)) == "it computes in float16"


def test_recomputed_blocks_keep_the_one_graph(tiny: TinyModels) -> None:
    model = model_of(tiny("llama"), "lora")
    stepper = Stepper(model, CrossEntropy(model, chunk=16))
    assert stepper._blockwise is not None and stepper._blockwise.fits()
    with checkpointed(structure.blocks(model)):
        assert not stepper._blockwise.fits()
    assert stepper._blockwise.fits()


def test_blocks_that_compute_something_else_keep_the_one_graph(tiny: TinyModels) -> None:
    model = model_of(tiny("llama"), "full")
    kind = type(structure.blocks(model)[1])

    class Scaled(kind):  # type: ignore[misc, valid-type]
        """A block with the same children and another formula."""

        def __call__(self, *arguments: Any, **named: Any) -> mx.array:
            return 1.1 * super().__call__(*arguments, **named)

    structure.blocks(model)[1].__class__ = Scaled
    reason = why_not(model, structure.split(model))
    assert reason == "its blocks in pieces compute something else"


def test_threads_never_see_what_another_one_traces(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks hold another thread's arrays, or are intercepted, while that one builds a graph."""
    model = model_of(tiny("llama"), "lora")
    objective = CrossEntropy(model, chunk=16, num_threads=2)
    rows = [collate(MemoryRows([40] * 32), [[row] for row in range(32)], isolate=False)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        steps = [
            step(objective, model, rows, monkeypatch, whole=False, num_threads=2) for _ in range(6)
        ]
    finally:
        sys.setswitchinterval(interval)
    assert len({one.loss for one in steps}) == 1
    for path, value in steps[0].gradients.items():
        assert all(mx.array_equal(one.gradients[path], value) for one in steps), path
