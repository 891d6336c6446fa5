"""The same recipe is the same run on one, two and three ranks, and goes on with any of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_slim.artifacts import load_tensors
from mlx_slim.errors import Interrupted, SlimError
from mlx_slim.finetuning.run import finetune
from tests.support.preferences import labelled, pairs, write
from tests.support.rank_runs import Case, run_case, run_on_ranks
from tests.support.runs import CtrlC, Recorder, losses, recipe, write_rows
from tests.support.tiny import TinyModels, tiny_model

_FOUR = {"steps": 4, "validate_every": 2, "batch_tokens": 128}
_METHODS: dict[str, dict[str, Any]] = {
    "full": {"train": _FOUR},  # a micro-batch a step: its rows are dealt
    "full-3": {"method": "full", "train": {**_FOUR, "accumulate": 3, "batching": "packed"}},
    "lora": {"train": {**_FOUR, "neftune_alpha": 5.0}, "threads": 1},
    "lora-2": {"method": "lora", "train": {**_FOUR, "accumulate": 2}},
    "qlora": {"train": _FOUR},
    "dora": {"train": {**_FOUR, "accumulate": 5}},
    "logits": {"train": _FOUR},
    "sequence": {"train": _FOUR},
    "mutual": {"train": {**_FOUR, "accumulate": 2}, "threads": 1},
    "kto": {"train": {"batch_tokens": 256, "accumulate": 1, "validate_every": 2}},
    "orpo": {"train": {"accumulate": 1}},
}
_ON_THREE = ("full", "lora", "qlora", "dora", "logits")


def _events(run: Path, name: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def case(tiny: TinyModels, folder: Path) -> Callable[..., Case]:
    """Return a function: name and place of a run -> the run."""
    rows = write_rows(folder / "rows.jsonl", 25)
    data = {
        "kto": write(folder / "labels.jsonl", labelled()),
        "orpo": write(folder / "pairs.jsonl", pairs()),
    }
    start = tiny_model(folder / "start", seed=7, num_hidden_layers=2)
    learns = {"steps": 25, "learning_rate": 5e-3, "save_every": 100, "validate_every": 100}
    finetune(recipe(start, rows, "full", **learns), folder / "teacher", observer=Recorder())
    teacher = folder / "teacher" / "model"

    def build(name: str, place: str) -> Case:
        settings = {"method": name, **_METHODS[name]}
        distilled = settings["method"] in ("logits", "sequence", "mutual")
        return Case(
            str(folder / place / name),
            str(tiny("llama")),
            str(data.get(name, rows)),
            teacher=str(teacher) if distilled else "",
            **settings,
        )

    return build


_LONG = {"steps": 10, "batch_tokens": 128, "save_every": 2, "validate_every": 4}


@pytest.fixture(scope="module")
def launched(case: Callable[..., Case], folder: Path) -> dict[int, str]:
    """All runs on two ranks and three; the last one was killed on each and went on with others."""
    killed = replace(case("lora", "killed"), train=_LONG, kill=(1,), at=4)
    first = run_on_ranks([*(case(name, "2") for name in _METHODS), killed], 2, folder)
    with pytest.raises(Interrupted):  # rank 1 died in step 4: one rank goes on from the second
        run_case(replace(killed, resume=True, kill=()), CtrlC(5))
    everyone = replace(killed, resume=True, kill=(0, 1, 2), at=8)
    second = run_on_ranks([*(case(name, "3") for name in _ON_THREE), everyone], 3, folder)
    run_case(replace(killed, resume=True, kill=()))
    return {2: first, 3: second}


@pytest.fixture(scope="module")
def one(case: Callable[..., Case], folder: Path) -> Path:
    """All runs on one rank."""
    for name in _METHODS:
        run_case(case(name, "1"))
    return folder / "1"


@pytest.mark.parametrize(
    ("name", "ranks"), [*((name, 2) for name in _METHODS), *((name, 3) for name in _ON_THREE)]
)
def test_the_run_is_that_of_one_rank(
    one: Path, launched: dict[int, str], name: str, ranks: int
) -> None:
    theirs, ours = one / name, one.parent / str(ranks) / name
    assert (ours / "run.json").exists(), launched[ranks]
    for event in ("step", "validation"):
        steps, expected = _events(ours, event), _events(theirs, event)
        same = ("step", "epoch", "tokens", "supervised_tokens", "learning_rate", "best")
        for key in same:
            assert [one.get(key) for one in steps] == [one.get(key) for one in expected], key
        values = [[one["loss"] for one in of] for of in (steps, expected)]
        assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert [one["path"] for one in _events(ours, "saved")] == [
        one["path"] for one in _events(theirs, "saved")
    ]
    assert _events(ours, "started")[0]["ranks"] == ranks
    assert json.loads((ours / "run.json").read_text())["ranks"] == ranks
    assert "ranks" not in _events(theirs, "started")[0]


def test_the_ranks_of_a_run_may_change_at_each_kill(
    case: Callable[..., Case], folder: Path, launched: dict[int, str]
) -> None:
    whole = replace(case("lora", "whole"), train=_LONG)
    run_case(whole)
    ours, theirs = Path(case("lora", "killed").out), Path(whole.out)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4), launched[3]
    resumed = [(one["step"], one.get("ranks")) for one in _events(ours, "resumed")]
    assert resumed == [(2, None), (5, 3), (6, None)]
    adapters = [load_tensors(run / "adapters" / "adapters.safetensors") for run in (ours, theirs)]
    for path, value in adapters[1].items():
        assert mx.allclose(adapters[0][path], value, rtol=1e-2, atol=1e-4).item(), path


def test_steps_of_another_size_are_refused_on_resume(
    case: Callable[..., Case], tmp_path: Path
) -> None:
    """What several ranks began when each had the whole of ``accumulate``."""
    run = replace(case("lora", "old"), out=str(tmp_path / "run"), train=_LONG)
    with pytest.raises(Interrupted):
        run_case(run, CtrlC(3))
    file = tmp_path / "run" / "checkpoints" / "step-3" / "state.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps({**state, "taken": 2 * state["taken"]}))
    with pytest.raises(SlimError, match="do not reach: 2 ranks took 2 in each") as refused:
        run_case(replace(run, resume=True))
    assert "train.scale_with_ranks=true" in refused.value.hint


def test_a_step_may_grow_with_the_ranks(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_slim.training import ranks, step_plan

    class Two:
        def size(self) -> int:
            return 2

    data, recorder = write_rows(tmp_path / "rows.jsonl"), Recorder()
    small = recipe(tiny("llama"), data, scale_with_ranks=True, steps=2, batch_tokens=128)
    with monkeypatch.context() as patch:
        patch.setattr(step_plan, "world", Two)
        patch.setattr(ranks, "world", Two)
        assert "2 × 1 micro-batches" in ranks.scaling_notice(small.recipe.train)
        assert step_plan.micro_batches_of(small.recipe.train) == 2
    finetune(small, tmp_path / "run", observer=recorder)
    assert not any("scale_with_ranks" in getattr(e, "message", "") for e in recorder.events)
