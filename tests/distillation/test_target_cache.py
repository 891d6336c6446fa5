"""Targets on disk: equal to those of the full logits, and complete after any kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm import load

from mlx_slim.artifacts import read_json
from mlx_slim.data.batches import Batch, Batcher, collate
from mlx_slim.distillation import target_cache
from mlx_slim.distillation.losses import DistillationLoss, Divergence, top
from mlx_slim.distillation.target_cache import (
    PlaceholderTargets,
    TargetGenerator,
    TargetLayout,
    cache_key,
    open_complete,
    target_layout,
)
from mlx_slim.errors import ResourceError, SlimError
from tests.support.rows import MemoryRows
from tests.support.tiny import VOCAB, tiny_model

LENGTHS = [5, 9, 17, 3, 30, 12, 2, 25, 8, 31]
ROWS = MemoryRows(LENGTHS)


def _batcher(rows: MemoryRows = ROWS) -> Batcher:
    return Batcher(rows, batch_tokens=64, max_length=32, mode="grouped", seed=0)


def _key(shape: TargetLayout, rows: MemoryRows = ROWS, temperature: float = 1.0) -> dict:
    return cache_key({"weights": "a"}, "tokenizer", rows, shape, temperature)


def _stored_targets(
    folder: Path,
    model: nn.Module,
    shape: TargetLayout,
    temperature: float = 1.0,
    num_threads: int = 1,
):
    generator = TargetGenerator(model, shape, temperature, num_threads)
    key = _key(shape, temperature=temperature)
    fractions = list(target_cache.write(folder, key, shape, _batcher(), generator))
    assert fractions[-1] == 1.0
    assert fractions == sorted(fractions)
    cache = open_complete(folder, shape)
    assert cache is not None
    return cache


class _Counted:
    """A generator that counts the rows it computes."""

    def __init__(self, generator: TargetGenerator) -> None:
        self._generator, self.rows = generator, 0

    def __call__(self, batch: Batch) -> target_cache.TeacherTargets:
        self.rows += batch.rows
        return self._generator(batch)


def _logits(model: nn.Module, row: int) -> mx.array:
    """The teacher's logits of a row's targets, computed alone."""
    ids, supervised = ROWS.row(row)
    logits = model(mx.array(ids[None]))[0]
    return logits[mx.array(np.flatnonzero(supervised) - 1)]


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "phi"])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_targets_are_read_back_by_number(
    tiny: Callable[..., Path], tmp_path: Path, architecture: str, num_threads: int
) -> None:
    model: Any = load(str(tiny(architecture)))[0]
    for k, temperature in ((7, 1.0), (VOCAB, 2.0)):
        shape = target_layout(ROWS, k, VOCAB)
        cache = _stored_targets(tmp_path / f"{k}", model, shape, temperature, num_threads)
        for row in range(len(LENGTHS)):
            batch = collate(ROWS, [[row]], isolate=False)
            ids, top_logs, rest = cache.columns(batch.sources_N)
            logits = _logits(model, row)
            expected = top(logits, k, temperature)
            best = mx.sort(expected[1], axis=-1)
            assert mx.allclose(mx.sort(top_logs, axis=-1), best, atol=1e-4)
            assert mx.allclose(rest, expected[2], atol=1e-3)
            scaled = logits / temperature
            at_ids = mx.take_along_axis(
                scaled - mx.logsumexp(scaled, axis=-1, keepdims=True), ids, axis=-1
            )
            assert mx.allclose(top_logs, at_ids, atol=1e-4)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "symmetric"])
def test_through_the_disk_more_tokens_come_nearer_from_below(
    tiny: Callable[..., Path], tmp_path: Path, divergence: Divergence
) -> None:
    teacher: Any = load(str(tiny("llama")))[0]
    student: Any = load(str(tiny_model(tmp_path / "student", seed=1)))[0]
    for model in (teacher, student):  # sharper than a fresh model, which is almost uniform
        model.lm_head.weight = 8 * model.lm_head.weight
    everything = np.arange(int(ROWS.supervised.sum()))
    logits = mx.concatenate([_logits(student, row) for row in range(len(LENGTHS))])
    teacher_logits = mx.concatenate([_logits(teacher, row) for row in range(len(LENGTHS))])
    no_targets = mx.zeros(len(everything), dtype=mx.int32)
    log_p, log_q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (teacher_logits, logits))
    forward = (mx.exp(log_p) * (log_p - log_q)).sum().item()
    reverse = (mx.exp(log_q) * (log_q - log_p)).sum().item()
    full = {"forward": forward, "reverse": reverse, "symmetric": (forward + reverse) / 2}
    token_loss = DistillationLoss(divergence)
    values = []
    for k in (1, 4, 16, 64, VOCAB):
        cache = _stored_targets(tmp_path / f"{k}", teacher, target_layout(ROWS, k, VOCAB))
        sums = token_loss.value(logits, no_targets, *cache.columns(everything))
        values.append(sums[2].item())
    assert values == sorted(values)
    assert values[0] < 0.9 * full[divergence]
    assert values[-1] == pytest.approx(full[divergence], rel=1e-4)


def test_a_kill_loses_at_most_a_batch_and_the_rest_is_not_asked_again(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model: Any = load(str(tiny("llama")))[0]
    shape = target_layout(ROWS, 6, VOCAB)
    straight = _stored_targets(tmp_path / "straight", model, shape)
    generator, computed = TargetGenerator(model, shape, 1.0, 1), []

    def dies(batch: Batch):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(batch.rows)
        return generator(batch)

    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        list(target_cache.write(folder, _key(shape), shape, _batcher(), dies))
    assert open_complete(folder, shape) is None
    rest = _Counted(generator)
    list(target_cache.write(folder, _key(shape), shape, _batcher(), rest))
    assert sum(computed) + rest.rows == len(ROWS)
    whole = open_complete(folder, shape)
    assert whole is not None
    everything = np.arange(shape.targets)
    for ours, theirs in zip(whole.columns(everything), straight.columns(everything), strict=True):
        assert mx.array_equal(ours, theirs).item()


def test_a_batch_of_which_some_rows_are_marked_is_computed_whole(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """A batch is marked by several writes; a smaller batch is rounded otherwise."""
    model: Any = load(str(tiny("llama")))[0]
    shape = target_layout(ROWS, 6, VOCAB)
    generator, folder = TargetGenerator(model, shape, 1.0, 1), tmp_path / "c"
    next(iter(target_cache.write(folder, _key(shape), shape, _batcher(), generator)))
    marks = np.fromfile(folder / "done.bin", np.uint8)
    assert marks.sum() > 1
    marks[np.flatnonzero(marks)[-1]] = 0
    marks.tofile(folder / "done.bin")
    every = _Counted(generator)
    list(target_cache.write(folder, _key(shape), shape, _batcher(), every))
    assert every.rows == len(ROWS)


def test_only_the_batches_of_needed_rows_are_computed(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model: Any = load(str(tiny("llama")))[0]
    shape = target_layout(ROWS, 6, VOCAB)
    whole = _stored_targets(tmp_path / "whole", model, shape)
    generator, folder = _Counted(TargetGenerator(model, shape, 1.0, 1)), tmp_path / "c"
    needed = np.zeros(len(ROWS), bool)
    needed[[0, 4]] = True
    writing = target_cache.write(folder, _key(shape), shape, _batcher(), generator, needed_R=needed)
    assert list(writing)[-1] == 1.0
    assert generator.rows < len(ROWS)
    some = open_complete(folder, shape, needed)
    assert some is not None and open_complete(folder, shape) is None
    done = np.fromfile(folder / "done.bin", np.uint8)
    firsts = np.cumsum(ROWS.supervised) - ROWS.supervised
    for row in range(len(ROWS)):
        sources = firsts[row] + np.arange(ROWS.supervised[row])
        if done[row]:
            for ours, theirs in zip(some.columns(sources), whole.columns(sources), strict=True):
                assert mx.array_equal(ours, theirs).item()
        else:
            with pytest.raises(SlimError, match="no targets for rows that it marks as done"):
                some.columns(sources)
    list(target_cache.write(folder, _key(shape), shape, _batcher(), generator))
    assert generator.rows == len(ROWS)


def test_stopping_keeps_what_was_written(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model: Any = load(str(tiny("llama")))[0]
    shape = target_layout(ROWS, 6, VOCAB)
    generator = TargetGenerator(model, shape, 1.0, 1)
    stopping = target_cache.write(
        tmp_path / "c", _key(shape), shape, _batcher(), generator, stop=lambda: True
    )
    (fraction,) = list(stopping)
    assert 0 < fraction < 1
    assert open_complete(tmp_path / "c", shape) is None
    first = next(
        iter(target_cache.write(tmp_path / "c", _key(shape), shape, _batcher(), generator))
    )
    assert first > fraction


def test_the_key_knows_all_that_the_numbers_depend_on() -> None:
    shape = target_layout(ROWS, 6, VOCAB)
    base = _key(shape)
    longer = MemoryRows([*LENGTHS[:-1], 30])
    other_ids = MemoryRows(LENGTHS, seed=1)
    other_mask = MemoryRows(LENGTHS)
    other_mask._rows[4][1][20] = False
    different = [
        cache_key({"weights": "b"}, "tokenizer", ROWS, shape, 1.0),
        cache_key({"weights": "a"}, "another", ROWS, shape, 1.0),
        _key(target_layout(ROWS, 7, VOCAB)),
        _key(target_layout(ROWS, 6, VOCAB - 1)),
        _key(shape, temperature=2.0),
        *(_key(shape, rows) for rows in (longer, other_ids, other_mask)),
    ]
    folders = {target_cache.folder_of(target_cache.Path(), key) for key in (base, *different)}
    assert len(folders) == 1 + len(different)
    assert _key(shape, MemoryRows(LENGTHS)) == base


def test_another_key_in_the_folder_is_not_gone_on_with(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model: Any = load(str(tiny("llama")))[0]
    shape = target_layout(ROWS, 6, VOCAB)
    _stored_targets(tmp_path / "c", model, shape)
    generator = TargetGenerator(model, shape, 3.0, 1)
    key = _key(shape, temperature=3.0)
    writing = target_cache.write(tmp_path / "c", key, shape, _batcher(), generator)
    assert next(writing) < 1
    assert open_complete(tmp_path / "c", shape) is None
    list(writing)
    assert read_json(tmp_path / "c" / "about.json") == key


def test_the_size_is_what_is_written_and_a_small_disk_is_refused(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = load(str(tiny("llama")))[0]
    shape = target_layout(ROWS, 6, VOCAB)
    folder = tmp_path / "c"
    assert target_cache.missing_bytes(folder, shape.nbytes) == shape.nbytes
    _stored_targets(folder, model, shape)
    assert sum(file.stat().st_size for file in folder.glob("*.bin")) == shape.nbytes
    assert target_cache.missing_bytes(folder, shape.nbytes) == 0
    monkeypatch.setattr(
        target_cache.shutil, "disk_usage", lambda _: type("D", (), {"free": 1000})()
    )
    target_cache.check_disk(tmp_path, 1000)
    with pytest.raises(ResourceError, match=r"1.02 kB .* 1.00 kB are free") as caught:
        target_cache.check_disk(tmp_path / "not" / "there", 1024)
    assert caught.value.exit_code == 3
    (tmp_path / "file").touch()
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SlimError, match=r"file is a file, the teachers' logits need a folder"):
            target_cache.check_disk(cache, 1)


def test_a_cut_file_is_not_taken_for_complete(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model: Any = load(str(tiny("llama")))[0]
    shape = target_layout(ROWS, 6, VOCAB)
    _stored_targets(tmp_path / "c", model, shape)
    with (tmp_path / "c" / "kept.bin").open("r+b") as handle:
        handle.truncate(100)
    assert open_complete(tmp_path / "c", shape) is None


def test_large_vocabularies_need_wider_ids() -> None:
    assert TargetLayout(1, 1, 4, 65536).id_type is np.uint16
    assert TargetLayout(1, 1, 4, 65537).id_type is np.int32


def test_the_stand_in_is_a_distribution() -> None:
    ids, top_logs, rest = PlaceholderTargets(TargetLayout(1, 1, 5, 100)).columns(np.full(3, -1))
    total = mx.exp(top_logs).sum(axis=-1) + mx.exp(rest)
    assert mx.allclose(total, mx.ones(3))
    assert ids.shape == top_logs.shape == (3, 5)
