"""One search on a tiny model, finished by one worker, that several files compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_slim.slimming.options import SlimOptions
from mlx_slim.slimming.run import slim
from tests.support.evals import write_tasks
from tests.support.runs import Recorder, write_rows

Setting = tuple[Path, SlimOptions]


@pytest.fixture(autouse=True)
def _no_general_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_SLIM_DATA", raising=False)


@pytest.fixture(scope="session")
def setting(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """A model and a budget that bits, depth and width can meet."""
    folder = tmp_path_factory.mktemp("setting")
    rows = write_rows(folder / "rows.jsonl")
    choice, _, _ = write_tasks(folder / "tasks", 24)
    options = SlimOptions(disk=150_000, tasks=(str(choice),), data=str(rows), limit=24)
    return tiny(), options


@pytest.fixture(scope="session")
def finished(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished search; tests that change it copy it."""
    return _searched(setting[0], tmp_path_factory.mktemp("search") / "out", setting[1])


@pytest.fixture(scope="session")
def whole_score(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search without a budget, for a model that keeps all of its score."""
    options = replace(setting[1], disk=None, keep=100.0)
    return _searched(setting[0], tmp_path_factory.mktemp("keep") / "out", options)


def _searched(model: Path, out: Path, options: SlimOptions) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLX_SLIM_DATA", raising=False)
        slim(model, out, options, Recorder())
    return out
