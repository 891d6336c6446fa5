"""Noise on the input embeddings: its size, its key, where it is and where it is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.config.load import load_recipe
from mlx_slim.data.batches import Batch, collate
from mlx_slim.errors import Interrupted, SlimError
from mlx_slim.finetuning.run import finetune
from mlx_slim.runtime import to_float
from mlx_slim.training.cross_entropy import CrossEntropy
from mlx_slim.training.neftune import NoisyEmbeddings, input_embedding
from mlx_slim.training.step import Stepper
from mlx_slim.training.validation import LossScorer
from tests.support.rows import MemoryRows
from tests.support.runs import CtrlC, Recorder, losses, write_rows
from tests.support.stock import stock_load
from tests.support.tiny import TinyModels

ROWS = MemoryRows([5, 9, 17, 3])
GROUPED, PACKED = [[0], [1], [2], [3]], [[0, 1], [2, 3]]
ALPHA = 5.0


def batch(groups: list[list[int]], *, isolate: bool = False, step: int = 0) -> Batch:
    return replace(collate(ROWS, groups, isolate=isolate), entropy=(0, step, 0))


def noise_of(folder: Path, one: Batch, kind: str = "") -> np.ndarray:
    """Return what is added to the embeddings of a batch, (B, T, D)."""
    model, _ = stock_load(str(folder))
    embedded: list[mx.array] = []

    def objective(model: Any, arrays: tuple[Any, ...], *, gradient: bool) -> mx.array:
        embedded.append(input_embedding(model)(arrays[0]))
        return mx.array(0.0)

    objective.metrics = ()  # type: ignore[attr-defined]
    objective.arrays = lambda batch: (mx.array(batch.tokens_BT),)  # type: ignore[attr-defined]
    noisy = NoisyEmbeddings(objective, model, ALPHA)  # type: ignore[arg-type]
    for gradient in (True, False):
        noisy(model, noisy.arrays(one), gradient=gradient)
    return np.array(embedded[0] - embedded[1])


def test_each_row_has_noise_of_its_own_length(tiny: TinyModels) -> None:
    """Packed rows too; padding has none."""
    for groups, isolate in ((GROUPED, False), (PACKED, True)):
        one = batch(groups, isolate=isolate)
        noise_BTD = noise_of(tiny("llama"), one)
        width = noise_BTD.shape[-1]
        for b, sequence in enumerate(groups):
            start = 0
            for row in sequence:
                length = int(ROWS.lengths[row]) - 1
                part = noise_BTD[b, start : start + length] * np.sqrt(length * width) / ALPHA
                assert np.abs(part).max() == pytest.approx(1, abs=0.05)
                assert np.abs(part).max() <= 1 + 1e-5
                assert part.std() == pytest.approx(3**-0.5, rel=0.1)
                start += length
            assert not noise_BTD[b, start:].any()


def test_the_key_is_of_the_step_and_leaves_the_random_state_alone(tiny: TinyModels) -> None:
    folder = tiny("llama")
    model, _ = stock_load(str(folder))
    noisy = NoisyEmbeddings(CrossEntropy(model, chunk=16), model, ALPHA)
    mx.random.seed(3)
    expected = np.array(mx.random.uniform(shape=(4,)))
    mx.random.seed(3)
    mx.eval(noisy(model, noisy.arrays(batch(GROUPED)), gradient=True))
    assert np.array_equal(expected, np.array(mx.random.uniform(shape=(4,))))
    first = noise_of(folder, batch(GROUPED))
    assert np.array_equal(first, noise_of(folder, batch(GROUPED)))
    assert not np.allclose(first, noise_of(folder, batch(GROUPED, step=1)))
    halves = batch(GROUPED).shards(2)
    assert [half.entropy for half in halves] == [(0, 0, 0, 0), (0, 0, 0, 1)]


@pytest.mark.parametrize("architecture", ["llama-tied", "gemma3_text"])
def test_the_model_computes_with_noisy_tables(tiny: TinyModels, architecture: str) -> None:
    """A tied head sees the table as it is, and gemma's scale comes after the noise."""
    folder = tiny(architecture)
    model, _ = stock_load(str(folder))
    one = batch(GROUPED)
    plain = CrossEntropy(model, chunk=16)
    noisy = NoisyEmbeddings(plain, model, ALPHA)
    table = input_embedding(model)
    before = type(table)
    loss = Stepper(model, noisy).step([one]).loss
    assert type(table) is before
    expected = loss_with(model, plain, one, noise_of(folder, one))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert loss != pytest.approx(Stepper(model, plain).step([one]).loss, rel=1e-5)
    scores = [to_float(LossScorer(model, each)(one)) for each in (plain, noisy)]
    assert scores[0] == scores[1]  # off in validation


def loss_with(model: Any, plain: CrossEntropy, one: Batch, noise_BTD: np.ndarray) -> float:
    """The loss of the model with these numbers added where the table is read, by hand."""
    table, added = input_embedding(model), mx.array(noise_BTD)

    class Added(type(table)):  # type: ignore[misc]
        def __call__(self, ids: mx.array) -> mx.array:
            return super().__call__(ids) + added

    kind, table.__class__ = type(table), Added
    try:
        return Stepper(model, plain).step([one]).loss
    finally:
        table.__class__ = kind


def test_a_compiled_step_has_the_same_noise(tiny: TinyModels) -> None:
    model, _ = stock_load(str(tiny("llama")))
    noisy = NoisyEmbeddings(CrossEntropy(model, chunk=16), model, ALPHA)
    steppers = [Stepper(model, noisy, compiled=compiled) for compiled in (False, True)]
    for step in range(2):  # the second one reads other keys from the same trace
        ours, theirs = (one.step([batch(GROUPED, step=step)]).loss for one in steppers)
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_model_without_a_known_table_is_refused() -> None:
    import mlx.nn as nn

    with pytest.raises(SlimError, match="no input embedding of a known name"):
        input_embedding(nn.Sequential(nn.Linear(2, 2)))


def test_a_run_with_noise_resumes_bit_for_bit(tiny: TinyModels, tmp_path: Path) -> None:
    file, data = tmp_path / "r.yaml", write_rows(tmp_path / "rows.jsonl")
    file.write_text(
        f"model: {tiny('llama')}\nmethod: lora\nadapter: {{rank: 4, dropout: 0.1}}\n"
        f"data: {{path: {data}, validation: 4}}\nreport_answers: 0\n"
        "train: {steps: 6, batch_tokens: 256, max_length: 128, learning_rate: 1.0e-3,"
        " save_every: 2, validate_every: 3}\n"
    )
    noisy = load_recipe(str(file), ["train.neftune_alpha=5"])
    straight, out = tmp_path / "straight", tmp_path / "killed"
    finetune(noisy, straight, observer=Recorder())
    with pytest.raises(Interrupted):
        finetune(noisy, out, observer=CtrlC())
    finetune(noisy, out, observer=Recorder(), resume=True)
    assert losses(out) == losses(straight)
    finetune(load_recipe(str(file)), tmp_path / "plain", observer=Recorder())
    assert losses(out) != losses(tmp_path / "plain")
