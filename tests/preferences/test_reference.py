"""The reference's log-probabilities on disk: killed anywhere they end as those of one go."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_slim.data.batches import Batcher
from mlx_slim.errors import SlimError
from mlx_slim.preferences.reference import ReferenceCache
from tests.preferences.support import Rows


class Scorer:
    """Scores a row by its number, and by the rows that it is scored with."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(self, model: Any, numbers: list[int]) -> np.ndarray:
        self.calls.append(numbers)
        return np.array([-n - len(numbers) / 10 for n in numbers], np.float32)


def _cache(folder: Path, rows: str = "rows") -> ReferenceCache:
    random = np.random.default_rng(0)
    store = Rows([([1] * int(n), [2]) for n in random.integers(3, 20, 11)])
    return ReferenceCache(folder, {"model": "m"}, Batcher(store, 40, 64, "grouped", 0), rows)


def _write(cache: ReferenceCache, scorer: Any, stop: Any = lambda: False) -> list[int]:
    return list(cache.write(scorer, None, stop))  # type: ignore[arg-type]


def test_it_is_zero_until_it_is_complete_and_kept_then(tmp_path: Path) -> None:
    cache, scorer = _cache(tmp_path / "reference"), Scorer()
    assert not cache.complete
    assert not cache(np.arange(11)).any()
    assert _write(cache, scorer)[-1] == 11
    values = cache(np.arange(11))
    assert np.array_equal(np.round(values + 0.5), -np.arange(11) + 0.0)
    again = _cache(tmp_path / "reference")
    assert again.complete
    assert np.array_equal(again(np.arange(11)), values)
    assert not _cache(tmp_path / "reference", "others").complete


def test_two_threads_may_ask_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(_cache(tmp_path / "reference"), Scorer())
    expected = _cache(tmp_path / "reference")(np.arange(11))
    reading, released, read = threading.Event(), threading.Event(), np.fromfile

    def slow(*words: Any) -> np.ndarray:
        if not reading.is_set():
            reading.set()
            assert released.wait(10)
        return read(*words)

    monkeypatch.setattr(np, "fromfile", slow)
    monkeypatch.setattr(np, "empty", lambda size, dtype: np.full(size, 77, dtype))  # nothing's
    cache = _cache(tmp_path / "reference")
    first = threading.Thread(target=cache, args=(np.arange(11),))
    first.start()
    assert reading.wait(10)
    values = cache(np.arange(11))  # the other thread is in the middle of its file
    released.set()
    first.join()
    assert np.array_equal(values, expected)


def test_a_damaged_one_is_refused(tmp_path: Path) -> None:
    _write(_cache(tmp_path / "reference"), Scorer())
    (file,) = (tmp_path / "reference").glob("*.bin")
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(SlimError, match="is not as this run wrote it"):
        _cache(tmp_path / "reference")(np.arange(11))
    file.unlink()  # as the hint says
    assert _write(_cache(tmp_path / "reference"), Scorer())[-1] == 11


@pytest.mark.parametrize("extra", [0, 2, 5])
def test_a_killed_one_resumes_with_the_batch_that_is_not_whole(tmp_path: Path, extra: int) -> None:
    whole = _cache(tmp_path / "whole")
    every = Scorer()
    _write(whole, every)
    cache, scorer = _cache(tmp_path / "killed"), Scorer()
    begun = _write(cache, scorer, stop=lambda: len(scorer.calls) == 2)
    assert not cache.complete
    assert len(begun) == 2
    (part,) = (tmp_path / "killed").iterdir()
    with part.open("ab") as handle:  # of a batch that was being written
        handle.write(b"\1" * extra)
    rest = Scorer()
    _write(_cache(tmp_path / "killed"), rest)
    assert scorer.calls + rest.calls == every.calls
    assert np.array_equal(_cache(tmp_path / "killed")(np.arange(11)), whole(np.arange(11)))
