"""Who runs jobs, as the options say; without Dask one at a time still works."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from mlx_slim.cluster.jobs import Job, package_hash
from mlx_slim.cluster.options import PoolOptions
from mlx_slim.cluster.pool import OneByOne, pool_of
from mlx_slim.errors import SlimError
from mlx_slim.run_dir import RunDir, RunKind


def test_wrong_options_and_a_missing_package_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(match: str, options: PoolOptions) -> None:
        with (
            pytest.raises(SlimError, match=match),
            pool_of(tmp_path, 0, options, 9, lambda text: None),
        ):
            pass

    refused("give|has its own", PoolOptions(2, "tcp://host:8786"))
    refused("no address", PoolOptions(cluster="host:8786"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("--workers 2 needs Dask", PoolOptions(2))
    with pool_of(tmp_path, 0, PoolOptions(), 9, lambda text: None) as pool:
        assert isinstance(pool, OneByOne) and pool.budget == 9 and pool.free


def test_several_on_this_machine_hold_the_lock_and_share_the_memory(tmp_path: Path) -> None:
    pytest.importorskip("distributed", reason="pip install 'mlx-slim[cluster]'")
    lines: list[str] = []
    with (
        RunDir(tmp_path / "out", RunKind("test", "jobs", "state.json")).claim(resume=False) as held,
        pool_of(tmp_path / "out", held.descriptor, PoolOptions(2), 10, lines.append) as pool,
    ):
        (tmp_path / "out/state.json").write_text("{}")
        assert (pool.most, pool.budget) == (2, 10)
        pool.start(Job("large", ("recipes",), memory=11))
        assert pool.wait().why.startswith("needs 11")
        # Without -o DIR/NAME this command writes nothing: it fails, with its own exit code.
        for name in ("a", "b"):
            pool.start(Job(name, ("tasks", "--no-such-option"), memory=6))
        assert not pool.free and pool.running == 2
        assert {(one.name, one.code) for one in (pool.wait(), pool.wait())} == {("a", 2), ("b", 2)}
    assert lines == []


def test_the_package_has_one_hash() -> None:
    assert len(package_hash()) == 12 and package_hash() == package_hash()
