"""A run that starts from an adapter: the same function first, the same adapter or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_slim.config.load import from_values
from mlx_slim.errors import SlimError
from mlx_slim.export.peft import export_peft
from mlx_slim.finetuning.build import prepare_model
from mlx_slim.finetuning.run import finetune
from mlx_slim.models.load import load
from tests.adapters.support import IDS
from tests.support.adapters import made, tuned_logits
from tests.support.runs import Recorder, losses, recipe, write_rows


def asked(model: Path, rows: Path, start: Path | str, method: str = "lora", train=(), **adapter):
    """Return a recipe that starts from an adapter."""
    values = recipe(model, rows, method, **dict(train)).recipe.model_dump(
        mode="json", exclude_unset=True
    )
    values["adapter"] = {"rank": 4, "init_from": str(start), **adapter}
    return from_values(values, "small", "test")


def logits(resolved) -> mx.array:
    model = prepare_model(resolved.recipe).model
    model.eval()
    return model(IDS)


@pytest.fixture
def rows(tmp_path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("dora", [False, True])
def test_it_begins_as_the_adapter_that_is_there(tiny, rows, tmp_path, dora):
    base, method = tiny("llama"), "dora" if dora else "lora"
    targets = ["q_proj", "up_proj"]
    adapter = made(tmp_path / "a", base, dora=dora, targets=targets, scaling="rslora")
    settings = {"targets": targets, "scaling": "rslora"}
    expected = tuned_logits(base, adapter)
    assert mx.array_equal(logits(asked(base, rows, adapter, method, **settings)), expected)
    export_peft(adapter, tmp_path / "p")
    found = logits(asked(base, rows, tmp_path / "p", method, **settings))
    assert mx.allclose(found, expected, atol=1e-5)
    assert not mx.allclose(load(base).model(IDS), expected, atol=1e-2)


@pytest.mark.parametrize("method", ["lora", "qlora", "dora"])
def test_a_run_goes_on_from_another_one(tiny, rows, tmp_path, method):
    base, first = tiny("llama"), tmp_path / "first"
    values = recipe(base, rows, method, steps=4, schedule="constant").recipe.model_dump(
        mode="json", exclude_unset=True
    )
    values["adapter"] = {"rank": 4}
    finetune(from_values(values, "small", "test"), first, observer=Recorder())
    small = asked(base, rows, first, method, {"steps": 2})
    finetune(small, tmp_path / "second", observer=Recorder())
    began, went_on = losses(first), losses(tmp_path / "second")
    assert went_on[1] < began[1]
    assert (tmp_path / "second" / "adapters" / "adapters.safetensors").exists()
    assert (tmp_path / "second" / "base").is_dir() == (method == "qlora")


def test_a_qlora_adapter_brings_its_base(tiny, rows, tmp_path):
    base, first = tiny("llama"), tmp_path / "first"
    values = recipe(base, rows, "qlora", steps=2).recipe.model_dump(mode="json", exclude_unset=True)
    finetune(
        from_values({**values, "adapter": {"rank": 4}}, "small", "test"), first, observer=Recorder()
    )
    tuned = prepare_model(asked(base, rows, first).recipe)
    assert tuned.base is not None and "quantization" in tuned.config
    other = asked(base, rows, first, "qlora").recipe
    other = other.model_copy(update={"quantize": other.quantize.model_copy(update={"bits": 8})})
    with pytest.raises(SlimError, match=r"adapter.init_from: .* was trained over"):
        prepare_model(other)


@pytest.mark.parametrize(
    ("method", "adapter", "says"),
    [
        ("lora", {"rank": 8, "alpha": 32}, "its rank is 4, not 8 (adapter.rank)"),
        ("lora", {"alpha": 8}, "its scale is 4, not 2 (adapter.alpha=16 gives it)"),
        ("lora", {"targets": ["q_proj", "k_proj"]}, "it does not adapt model.layers.0.self_attn.k"),
        ("lora", {"targets": ["q_proj"], "layers": 1}, "self_attn.q_proj too (adapter.targets"),
        ("dora", {}, "it is a LoRA, not a DoRA (method)"),
    ],
)
def test_another_adapter_than_the_recipe_trains_is_refused(
    tiny, rows, tmp_path, method, adapter, says
):
    start = made(tmp_path / "a", tiny("llama"), targets=["q_proj"])
    given = asked(tiny("llama"), rows, start, method, **{"targets": ["q_proj"], **adapter})
    with pytest.raises(SlimError) as caught:
        finetune(given, tmp_path / "run", observer=Recorder())
    assert says in caught.value.message and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_start_that_is_none_is_refused(tiny, rows, tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(SlimError, match=r"is no adapter folder|does not exist"):
            prepare_model(asked(tiny("llama"), rows, folder).recipe)
    for adapter in ({"init": "pissa"}, {"adaptive": {"target_rank": 2}}):
        with pytest.raises(SlimError, match="are both a start"):
            asked(tiny("llama"), rows, tmp_path, **adapter)
    with pytest.raises(SlimError, match=r"adapter.init_from is set, and method=full"):
        asked(tiny("llama"), rows, tmp_path, "full")


def test_a_resume_needs_the_adapter_that_it_started_from(tiny, rows, tmp_path):
    base, out = tiny("llama"), tmp_path / "run"
    start = made(tmp_path / "a", base)
    finetune(asked(base, rows, start, train={"steps": 3}), out, observer=Recorder())
    record = json.loads((out / "recipe.json").read_text())
    assert list(record["adapters"]) == [str(start)]
    start.rename(tmp_path / "kept")
    made(start, base)
    longer = asked(base, rows, start, train={"steps": 5})
    with pytest.raises(SlimError, match=f"{start}: other contents"):
        finetune(longer, out, observer=Recorder(), resume=True)
    shutil.rmtree(start)
    (tmp_path / "kept").rename(start)
    finetune(longer, out, observer=Recorder(), resume=True)
    assert len(losses(out)) == 5
