"""A sharded run is the run of one rank: losses, checkpoints, what is saved."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_slim.artifacts import load_tensors
from mlx_slim.config.load import from_values
from mlx_slim.errors import SlimError
from mlx_slim.events import Notice
from mlx_slim.finetuning import sharding
from mlx_slim.finetuning.run import finetune
from mlx_slim.models.load import read_config
from mlx_slim.planner.memory import predict
from tests.support.runs import Recorder, losses, recipe, run_script, write_rows
from tests.support.tiny import TinyModels

TRAIN: dict[str, Any] = {"batch_tokens": 128, "accumulate": 3, "schedule": "constant"}
SCRIPT = """
import sys
from pathlib import Path
from mlx_slim.finetuning.run import finetune
from tests.finetuning.test_sharding import TRAIN
from tests.support.runs import Recorder, recipe
model, data, out = map(Path, sys.argv[1:4])
for method in sys.argv[4:]:
    sharded = recipe(model, data, method, **TRAIN, steps=6, shard="full")
    finetune(sharded, out / method, observer=Recorder())
"""
METHODS = ("full", "lora", "qlora")


@pytest.fixture(scope="module")
def runs(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the rows, and a sharded run of two ranks for each method."""
    folder = tmp_path_factory.mktemp("sharded")
    data = write_rows(folder / "rows.jsonl", 25)
    done = run_script(SCRIPT, tiny("llama"), data, folder, *METHODS, ranks=2)
    assert all((folder / method / "run.json").exists() for method in METHODS), done.stderr
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_with_slices_are_one_and_its_checkpoint_resumes_on_one(
    tiny: TinyModels, runs: Path, tmp_path: Path, method: str
) -> None:
    """Adapters have dropout (``recipe``): its masks are those of one rank too."""
    model, data = tiny("llama"), runs / "rows.jsonl"
    one = finetune(
        recipe(model, data, method, **TRAIN, steps=8), tmp_path / "one", observer=Recorder()
    )
    before = losses(runs / method)
    record = json.loads((runs / method / "run.json").read_text())
    assert record["ranks"] == 2
    assert record["result"]["trainable"] == one.trainable
    saved = "model/model.safetensors" if method == "full" else "adapters/adapters.safetensors"
    assert (runs / method / saved).exists()
    for name in ("weights", "optimizer"):
        ours, theirs = (
            load_tensors(run / "checkpoints" / "step-6" / f"{name}.safetensors")
            for run in (runs / method, tmp_path / "one")
        )
        assert ours.keys() == theirs.keys()
        for path, value in theirs.items():
            assert value.shape == ours[path].shape
            assert mx.allclose(value, ours[path], rtol=1e-2, atol=1e-4), path
    longer = recipe(model, data, method, **TRAIN, steps=8)
    finetune(longer, runs / method, observer=Recorder(), resume=True)
    after = losses(runs / method)
    assert sorted(after) == sorted(losses(tmp_path / "one")) == list(range(1, 9))
    for step, loss in losses(tmp_path / "one").items():
        assert math.isclose(after[step], loss, rel_tol=1e-4), step
        assert step > 6 or before[step] == after[step]


@pytest.mark.parametrize(
    ("section", "values", "reason"),
    [
        ("train", {"optimizer": "muon"}, "train.optimizer=muon"),
        ("train", {"optimizer": "adafactor"}, "train.optimizer=adafactor"),
        ("adapter", {"init": "pissa"}, "adapter.init=pissa"),
        ("adapter", {"pooled": True}, "adapter.pooled=true"),
        ("quantize", {"qat": True}, "quantize.qat=true"),
        ("forgetting", {"path": "a.txt"}, "the section forgetting"),
        ("train", {"optimizer": "lion"}, ""),
    ],
)
def test_what_cannot_be_sharded_is_named(
    tmp_path: Path, section: str, values: dict[str, Any], reason: str
) -> None:
    resolved = from_values({"model": str(tmp_path), section: values}, "one", "test")
    assert sharding.why_not(resolved.recipe) == reason


class TwoRanks:
    """Stands for the group of two ranks."""

    def size(self) -> int:
        """Return 2."""
        return 2


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the decision be that of two ranks, of which the other one has memory enough."""
    monkeypatch.setattr(sharding, "world", TwoRanks)
    monkeypatch.setattr(sharding, "all_gather_bytes", lambda mine: [mine, b"0"])


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize(("fits", "shard"), [(True, "none"), (False, "full")])
def test_auto_shards_what_one_rank_cannot_hold(tiny: TinyModels, fits: bool, shard: str) -> None:
    model = tiny("llama")
    config = read_config(model)
    small = recipe(model, model, "full").recipe
    whole = predict(config, small).predicted_peak_bytes
    observer = Recorder()
    resolved, expected = sharding.resolve(
        small,
        lambda each: predict(config, each, ranks=2),
        whole + 1 if fits else whole - 1,
        observer,
    )
    assert resolved.train.shard == shard
    assert sharding.shards(resolved) is not fits
    texts = [one.message for one in observer.events if isinstance(one, Notice)]
    if fits:
        assert not texts
    else:
        assert "sharded among 2 ranks" in texts[0] and "JACCL" in texts[0]
        assert expected.breakdown["optimizer"] < predict(config, small).breakdown["optimizer"]


@pytest.mark.usefixtures("two_ranks")
def test_full_is_refused_with_what_needs_whole_matrices(tiny: TinyModels) -> None:
    model = tiny("llama")
    small = recipe(model, model, "full", optimizer="muon", shard="full").recipe
    config = read_config(model)
    with pytest.raises(SlimError, match=r"cannot be sharded with train.optimizer=muon"):
        sharding.resolve(small, lambda each: predict(config, each), 1 << 40, Recorder())


def test_one_rank_is_never_sharded(tiny: TinyModels) -> None:
    model = tiny("llama")
    small = recipe(model, model, "full", shard="full").recipe
    prediction = predict(read_config(model), small)
    resolved, expected = sharding.resolve(small, lambda each: prediction, 1, Recorder())
    assert resolved == small
    assert expected is prediction
    assert not sharding.shards(resolved)
