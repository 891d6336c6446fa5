"""Targets of a teacher for every supervised token, on disk: k log-probabilities and the rest's.

Invariant: a folder is for one teacher, one tokenizer, one list of rows, one temperature and one k
(its key), and is complete for a run once every row that the run reads is marked done; a kill loses
at most the batch that was being written, because a row is marked after its numbers are on disk.
Rows that no step reads are not computed: their places in the files are holes. Reading takes memory
for the requested rows only. Teachers are loaded one at a time, and are not needed again.
Try it: ``mlx-slim distill distill-smollm2 -o runs/distilled``.

Layout (S supervised ids of the rows in order, K top tokens, R rows): ``ids.bin`` (S, K) uint16
where that holds the vocabulary, else int32; ``kept.bin`` (S, K) float32; ``rest.bin`` (S,) float32;
``done.bin`` (R,) uint8; ``about.json``, the key in full. Logarithms of probabilities at temperature
T. In float16 they would take a third less, change a divergence of 0.3 by 2e-5 (logits in
float16: by 7e-4) and make it negative between equal models (SmolLM2-135M against a tune of it).
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim import blas
from mlx_slim.artifacts import disk_errors, fsync, hash_json, read_json, write_json
from mlx_slim.data.batches import Batch, RowStore
from mlx_slim.data.plans import Plan
from mlx_slim.distillation.losses import top
from mlx_slim.errors import ResourceError, SlimError
from mlx_slim.models import structure
from mlx_slim.models.host_exponentials import host_exponentials
from mlx_slim.reading import JsonObject, short
from mlx_slim.runtime import free_disk
from mlx_slim.threads import run_in_threads
from mlx_slim.training.chunk_size import chunk_size, part_count
from mlx_slim.training.cross_entropy import batch_arrays, supervised_rows
from mlx_slim.units import human_bytes

_VERSION = 1  # of the files: raise it when the same key would give other numbers
_SMALL = 1 << 16
# ids_NK, top_NK (log-probabilities of these) and rest_N (that of all other tokens)
TeacherTargets = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class TargetLayout:
    """The shape of a cache.

    Attributes:
        rows: R.
        targets: S, supervised ids of all rows.
        top_k: K.
        vocabulary: Tokens that both teacher and student have.
    """

    rows: int
    targets: int
    top_k: int
    vocabulary: int

    @property
    def id_type(self) -> Any:
        """The dtype of a token id."""
        return np.uint16 if self.vocabulary <= _SMALL else np.int32

    @property
    def files(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """Name -> dtype and shape."""
        return {
            "ids.bin": (self.id_type, (self.targets, self.top_k)),
            "kept.bin": (np.float32, (self.targets, self.top_k)),
            "rest.bin": (np.float32, (self.targets,)),
            "done.bin": (np.uint8, (self.rows,)),
        }

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(
            np.dtype(kind).itemsize * int(np.prod(shape)) for kind, shape in self.files.values()
        )


def target_layout(rows: RowStore, top_k: Literal["all"] | int, vocabulary: int) -> TargetLayout:
    """Return the shape of a teacher's targets for ``rows``."""
    k = vocabulary if top_k == "all" else min(top_k, vocabulary)
    return TargetLayout(len(rows), int(rows.supervised.sum()), k, vocabulary)


def rows_print(rows: RowStore) -> str:
    """Return a hash of all token ids and supervised masks, in order."""
    digest = hashlib.sha256()
    for i in range(len(rows)):
        ids_T, supervised_T = rows.row(i)
        digest.update(len(ids_T).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(ids_T, np.int32).tobytes())
        digest.update(np.packbits(supervised_T).tobytes())
    return digest.hexdigest()


def cache_key(
    teacher: JsonObject, tokenizer: str, rows: RowStore, shape: TargetLayout, temperature: float
) -> JsonObject:
    """Return what the numbers depend on.

    Args:
        teacher: Hashes of its weights and its adapter, and its dtype of computation.
        tokenizer: Hash of the tokenizer that made the rows.
        rows: The rows.
        shape: Of the cache.
        temperature: T.
    """
    return {
        "version": _VERSION,
        "teacher": teacher,
        "tokenizer": tokenizer,
        "rows": rows_print(rows),
        "kept": shape.top_k,
        "vocabulary": shape.vocabulary,
        "temperature": temperature,
    }


class TargetCache:
    """A cache that is complete for its reader, memory-mapped and read-only."""

    def __init__(self, folder: Path, shape: TargetLayout) -> None:
        self.folder = folder
        self.top_k = shape.top_k
        self._files = {
            name: np.memmap(folder / name, kind, "r", shape=size)
            for name, (kind, size) in shape.files.items()
        }

    def columns(self, sources_N: np.ndarray) -> tuple[mx.array, mx.array, mx.array]:
        """Return ids_NK int32, top_NK and rest_N float32 of the targets numbered ``sources_N``.

        −1, in a batch that is for measuring only, takes the last one's.

        Raises:
            SlimError: Where a target is a hole although its row is marked.
        """
        ids, top_k, rest = (self._files[name] for name in ("ids.bin", "kept.bin", "rest.bin"))
        top_NK, rest_N = top_k[sources_N], rest[sources_N]
        hole_N = (rest_N == 0) & (top_NK[:, 0] == 0)  # two probabilities of 1 are no distribution
        if hole_N[sources_N >= 0].any():
            raise SlimError(
                f"{short(self.folder)} has no targets for rows that it marks as done",
                "remove it: the teacher computes them again",
            )
        return mx.array(ids[sources_N].astype(np.int32)), mx.array(top_NK), mx.array(rest_N)


class PlaceholderTargets:
    """Replaces a cache while only memory is measured: numbers of the right shapes."""

    def __init__(self, shape: TargetLayout) -> None:
        self.top_k = shape.top_k

    def columns(self, sources_N: np.ndarray) -> tuple[mx.array, mx.array, mx.array]:
        """Return uniform probabilities of the first K tokens."""
        count = len(sources_N)
        ids_NK = mx.broadcast_to(mx.arange(self.top_k, dtype=mx.int32), (count, self.top_k))
        top_NK = mx.full((count, self.top_k), -float(np.log(self.top_k + 1)))
        return ids_NK, top_NK, top_NK[:, 0]


def folder_of(cache: Path, key: JsonObject) -> Path:
    """Return the folder of a key inside ``cache``."""
    return cache / hash_json(key)[:16]


def open_complete(
    folder: Path, shape: TargetLayout, needed_R: np.ndarray | None = None
) -> TargetCache | None:
    """Return the cache in ``folder`` if it has all rows, or those that are needed, else None."""
    for name, (kind, size) in shape.files.items():
        file = folder / name
        expected = np.dtype(kind).itemsize * int(np.prod(size))
        if not file.is_file() or file.stat().st_size != expected:
            return None
    done_R = np.fromfile(folder / "done.bin", np.uint8)
    if not (done_R if needed_R is None else done_R[needed_R]).all():
        return None
    return TargetCache(folder, shape)


def missing_bytes(folder: Path, nbytes: int) -> int:
    """Return how many of ``nbytes`` the files in ``folder`` do not take from the disk yet."""
    blocks = sum(f.stat().st_blocks * 512 for f in folder.glob("*.bin")) if folder.is_dir() else 0
    return max(0, nbytes - blocks)


def check_disk(cache: Path, needed: int) -> None:
    """Check, before a teacher is loaded, that the disk can hold the targets.

    Raises:
        ResourceError: Says how much is needed and free.
        SlimError: If a file is in the way.
    """
    place = next(one for one in (cache, *cache.absolute().parents) if one.exists())
    if not place.is_dir():
        raise SlimError(
            f"{short(place)} is a file, the teachers' logits need a folder",
            "choose another distill.cache",
        )
    free = free_disk(cache)
    if free < needed:
        raise ResourceError(
            f"the teachers' logits need {human_bytes(needed)} in {cache}, "
            f"{human_bytes(free)} are free",
            "store fewer logits with distill.top_k, or choose a larger disk with distill.cache",
        )


def _put(handle: BinaryIO, numbers: np.ndarray, values: np.ndarray) -> None:
    """Write each row of ``values`` at its number; a full disk raises ``OSError``, no SIGBUS."""
    runs = np.split(np.arange(len(numbers)), np.flatnonzero(np.diff(numbers) != 1) + 1)
    width = values.nbytes // len(values)
    for run in runs:
        handle.seek(int(numbers[run[0]]) * width)
        handle.write(np.ascontiguousarray(values[run]).tobytes())
    handle.flush()
    fsync(handle.fileno())


def write(
    folder: Path,
    key: JsonObject,
    shape: TargetLayout,
    batcher: Any,
    answer: Callable[[Any], TeacherTargets],
    *,
    needed_R: np.ndarray | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[float]:
    """Fill the cache in ``folder``; an interrupted call is resumed.

    Args:
        folder: Created if it is missing.
        key: See ``cache_key``.
        shape: Of the cache.
        batcher: The rows, ``grouped`` (``target_generation.Batches``); the batches of its epoch 0
            are computed.
        answer: Returns the teacher's targets of a batch.
        needed_R: Rows whose batches are computed, bool (R,); None is all.
        stop: Called after each batch; true ends the iteration early, what is written stays.

    Yields:
        The fraction of the rows to compute that is done, after each batch.

    Raises:
        ResourceError: If the disk is full.
    """
    about = folder / "about.json"
    with disk_errors(folder), contextlib.ExitStack() as stack:
        if about.is_file() and read_json(about) != key:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(about, key)
        handles = []
        for name, (kind, size) in shape.files.items():
            (folder / name).touch()
            handle = stack.enter_context((folder / name).open("r+b"))
            handle.truncate(np.dtype(kind).itemsize * int(np.prod(size)))
            handles.append(handle)
        done = np.fromfile(folder / "done.bin", np.uint8)
        batches = batches_with(batcher.plan(0), needed_R)
        rows = np.concatenate([np.zeros(0, int), *batches])
        for numbers in batches:
            if done[numbers].all():
                continue  # else the whole batch: fewer rows would be rounded otherwise
            batch = batcher.batch([[int(row)] for row in numbers])
            for handle, values in zip(handles[:3], answer(batch), strict=True):
                _put(handle, batch.sources_N, values)
            done[numbers] = 1
            _put(handles[3], np.sort(numbers), done[np.sort(numbers)])
            yield float(done[rows].mean())
            if stop():
                return


def batches_with(plan: Plan, needed_R: np.ndarray | None) -> list[np.ndarray]:
    """Return the batches that have a needed row, each as the numbers of all its rows."""
    batches = [np.array([row for group in groups for row in group]) for groups in plan]
    return [rows for rows in batches if needed_R is None or needed_R[rows].any()]


class TargetGenerator:
    """Computes the targets of a loaded teacher.

    Args:
        model: In evaluation mode.
        shape: Of the cache.
        temperature: T.
        num_threads: Shards of a batch that are computed concurrently on a CPU.
    """

    def __init__(
        self, model: nn.Module, shape: TargetLayout, temperature: float, num_threads: int
    ) -> None:
        self.model = model
        self._shape = shape
        self._temperature = temperature
        self._num_threads = num_threads
        self._split = structure.split(model, shape.vocabulary)
        mx.eval(model.parameters())

    @host_exponentials()
    def __call__(self, batch: Batch) -> TeacherTargets:
        """Return the targets of a batch."""
        shards = batch.shards(part_count(self._num_threads, batch.computed_tokens))
        if len(shards) == 1:
            return self._shard(batch)
        with blas.single_threaded():
            targets = run_in_threads(self._shard, [(shard,) for shard in shards], self._num_threads)
        ids_NK, top_NK, rest_N = (np.concatenate(column) for column in zip(*targets, strict=True))
        return ids_NK, top_NK, rest_N

    def _shard(self, batch: Batch) -> TeacherTargets:
        tokens_BT, positions_N, _, segments_BT = batch_arrays(batch)
        rows = supervised_rows(self.model, self._split, tokens_BT, positions_N, segments_BT)
        chunk = chunk_size(self._shape.vocabulary, None, self._num_threads)
        columns: list[tuple[np.ndarray, ...]] = []
        for start in range(0, rows.shape[0], chunk):
            hidden = rows[start : start + chunk]
            logits_CV = hidden if self._split is None else self._split.head(hidden)
            logits_CV = logits_CV[:, : self._shape.vocabulary]
            targets = top(logits_CV, self._shape.top_k, self._temperature)
            mx.eval(targets)
            columns.append(tuple(np.array(value) for value in targets))
        ids_NK, top_NK, rest_N = (np.concatenate(column) for column in zip(*columns, strict=True))
        return ids_NK.astype(self._shape.id_type), top_NK, rest_N
