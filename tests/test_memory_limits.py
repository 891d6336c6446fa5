"""Metal's wired limit and MLX's cache limit: set while work is done, and as before afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_slim import runtime
from mlx_slim.config.schema import QuantizeConfig
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.chat import open_session
from mlx_slim.evaluation.run import EvalOptions, evaluate
from mlx_slim.events import Event, Notice, StepDone
from mlx_slim.export.fuse import FuseOptions, fuse
from mlx_slim.finetuning.profile import probe
from mlx_slim.finetuning.run import finetune
from mlx_slim.pruning.run import PruneOptions, prune
from mlx_slim.quantization.run import CompressOptions, compress
from tests.support.adapters import write_adapter
from tests.support.evals import write_tasks
from tests.support.gpu import Metal
from tests.support.runs import recipe, write_rows
from tests.support.tiny import TinyModels


@pytest.fixture
def metal(as_on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> Metal:
    return Metal(monkeypatch)


def test_the_limits_are_set_inside_and_restored(metal: Metal) -> None:
    with runtime.memory_limits(8_000):
        assert (metal.wired, metal.cache) == (Metal.WORKING_SET, 1_000)
        with runtime.memory_limits():  # of the device: the working set
            assert (metal.wired, metal.cache) == (Metal.WORKING_SET, Metal.WORKING_SET // 8)
        assert (metal.wired, metal.cache) == (Metal.WORKING_SET, 1_000)
    assert (metal.wired, metal.cache) == (0, Metal.CACHE)
    with pytest.raises(ZeroDivisionError), runtime.memory_limits():
        _ = 1 / 0
    assert (metal.wired, metal.cache) == (0, Metal.CACHE)


def test_a_limit_that_the_system_refuses_leaves_the_other_as_it_was(
    metal: Metal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(limit: int) -> int:
        raise ValueError("[set_wired_limit] above the system's limit")

    monkeypatch.setattr(mx, "set_wired_limit", refuse)
    with pytest.raises(ValueError, match="above"), runtime.memory_limits():
        pass
    assert metal.cache == Metal.CACHE


def test_the_budget_is_the_share_of_the_working_set_above_which_mlx_lm_warns(metal: Metal) -> None:
    assert runtime.memory_budget("auto") == int(0.9 * Metal.WORKING_SET)


def test_nothing_is_wired_without_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    metal = Metal(monkeypatch)
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "a CPU"})
    with runtime.memory_limits(8_000):  # a CPU keeps no free buffers
        assert (metal.history, metal.cache) == ([], 0)
    assert (metal.history, metal.cache) == ([], Metal.CACHE)


class Watching:
    """Notes both limits at each event."""

    def __init__(self, metal: Metal) -> None:
        self.metal = metal
        self.seen: set[tuple[int, bool]] = set()

    def notify(self, event: Event) -> None:
        self.seen.add((self.metal.wired, self.metal.cache == Metal.CACHE))


def _train(model: Path, folder: Path, watching: Watching) -> None:
    small = recipe(model, write_rows(folder / "rows.jsonl"), steps=1)
    finetune(small, folder / "out", observer=watching)


def _score(model: Path, folder: Path, watching: Watching) -> None:
    choice, answers, _ = write_tasks(folder / "tasks", 4)
    evaluate(model, [str(choice), str(answers)], folder / "out", EvalOptions(), observer=watching)


def _chat(model: Path, folder: Path, watching: Watching) -> None:
    for _ in open_session(model).stream([5, 6, 7], max_tokens=3, temperature=0.0):
        watching.notify(Notice("a piece of the answer"))


def _prune(model: Path, folder: Path, watching: Watching) -> None:
    (folder / "text.txt").write_text("a line of plain words to look at\n" * 40)
    options = PruneOptions(layers="1", calibration=str(folder / "text.txt"), held_out=64, length=32)
    prune(model, folder / "out", options, watching)


def _quantize(model: Path, folder: Path, watching: Watching) -> None:
    options = CompressOptions(QuantizeConfig(group_size=32), fidelity_samples=0)
    compress(model, folder / "out", options, watching)


def _fuse(model: Path, folder: Path, watching: Watching) -> None:
    (folder / "text.txt").write_text("a line of plain words to look at\n" * 9)
    options = FuseOptions(calibration=str(folder / "text.txt"), length=32)
    fuse(model, write_adapter(folder / "a", model), folder / "out", options, watching)


@pytest.mark.parametrize("work", [_train, _score, _chat, _prune, _quantize, _fuse])
def test_every_command_that_computes_is_inside(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[..., None]
) -> None:
    metal = Metal(monkeypatch)
    watching = Watching(metal)
    work(tiny("llama"), tmp_path, watching)
    assert (Metal.WORKING_SET, False) in watching.seen
    assert (metal.wired, metal.cache) == (0, Metal.CACHE)


def test_a_probe_is_inside(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metal = Metal(monkeypatch)
    probe(recipe(tiny("llama"), write_rows(tmp_path / "rows.jsonl")).recipe, steps=1)
    assert (metal.history, metal.cache) == ([Metal.WORKING_SET, 0], Metal.CACHE)


def test_a_run_that_fails_restores_them(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(Watching):
        def notify(self, event: Event) -> None:
            super().notify(event)
            if isinstance(event, StepDone):
                raise SlimError("the disk is full")

    watching = Full(Metal(monkeypatch))
    with pytest.raises(SlimError, match="the disk is full"):
        _train(tiny("llama"), tmp_path, watching)
    assert (Metal.WORKING_SET, False) in watching.seen
    assert (watching.metal.wired, watching.metal.cache) == (0, Metal.CACHE)
