"""A run that starts from an adapter: the same function first, the same adapter or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_slim.config.load import Resolved, from_values
from mlx_slim.errors import SlimError
from mlx_slim.export.peft import export_peft
from mlx_slim.finetuning.build import prepare_model
from mlx_slim.finetuning.run import finetune
from mlx_slim.models.load import load
from tests.adapters.support import IDS
from tests.support.adapters import tuned_logits, write_adapter
from tests.support.runs import Recorder, losses, recipe, write_rows
from tests.support.tiny import TinyModels


def start_recipe(
    model: Path,
    rows: Path,
    start: Path | str,
    method: str = "lora",
    train: Any = (),
    **adapter: Any,
) -> Resolved:
    """Return a recipe that starts from an adapter."""
    values = recipe(model, rows, method, **dict(train)).recipe.model_dump(
        mode="json", exclude_unset=True
    )
    values["adapter"] = {"rank": 4, "init_from": str(start), **adapter}
    return from_values(values, "small", "test")


def logits(resolved: Resolved) -> mx.array:
    model = prepare_model(resolved.recipe).model
    model.eval()
    return model(IDS)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("dora", [False, True])
def test_it_begins_as_the_adapter_that_is_there(
    tiny: TinyModels, rows: Path, tmp_path: Path, dora: bool
) -> None:
    base, method = tiny("llama"), "dora" if dora else "lora"
    targets = ["q_proj", "up_proj"]
    adapter = write_adapter(tmp_path / "a", base, dora=dora, targets=targets, scaling="rslora")
    settings = {"targets": targets, "scaling": "rslora"}
    expected = tuned_logits(base, adapter)
    assert mx.array_equal(logits(start_recipe(base, rows, adapter, method, **settings)), expected)
    export_peft(adapter, tmp_path / "p")
    start_logits = logits(start_recipe(base, rows, tmp_path / "p", method, **settings))
    assert mx.allclose(start_logits, expected, atol=1e-5)
    assert not mx.allclose(load(base).model(IDS), expected, atol=1e-2)


@pytest.mark.parametrize("method", ["lora", "qlora", "dora"])
def test_a_run_goes_on_from_another_one(
    tiny: TinyModels, rows: Path, tmp_path: Path, method: str
) -> None:
    base, first = tiny("llama"), tmp_path / "first"
    values = recipe(base, rows, method, steps=4, schedule="constant").recipe.model_dump(
        mode="json", exclude_unset=True
    )
    values["adapter"] = {"rank": 4}
    finetune(from_values(values, "small", "test"), first, observer=Recorder())
    small = start_recipe(base, rows, first, method, {"steps": 2})
    finetune(small, tmp_path / "second", observer=Recorder())
    began, went_on = losses(first), losses(tmp_path / "second")
    assert went_on[1] < began[1]
    assert (tmp_path / "second" / "adapters" / "adapters.safetensors").exists()
    assert (tmp_path / "second" / "base").is_dir() == (method == "qlora")


def test_a_qlora_adapter_brings_its_base(tiny: TinyModels, rows: Path, tmp_path: Path) -> None:
    base, first = tiny("llama"), tmp_path / "first"
    values = recipe(base, rows, "qlora", steps=2).recipe.model_dump(mode="json", exclude_unset=True)
    finetune(
        from_values({**values, "adapter": {"rank": 4}}, "small", "test"), first, observer=Recorder()
    )
    tuned = prepare_model(start_recipe(base, rows, first).recipe)
    assert tuned.base is not None and "quantization" in tuned.config
    other = start_recipe(base, rows, first, "qlora").recipe
    other = other.model_copy(update={"quantize": other.quantize.model_copy(update={"bits": 8})})
    with pytest.raises(SlimError, match=r"adapter.init_from: .* was trained on"):
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
    tiny: TinyModels, rows: Path, tmp_path: Path, method: str, adapter: dict[str, Any], says: str
) -> None:
    start = write_adapter(tmp_path / "a", tiny("llama"), targets=["q_proj"])
    resolved = start_recipe(
        tiny("llama"), rows, start, method, **{"targets": ["q_proj"], **adapter}
    )
    with pytest.raises(SlimError) as caught:
        finetune(resolved, tmp_path / "run", observer=Recorder())
    assert says in caught.value.message and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_start_that_is_none_is_refused(tiny: TinyModels, rows: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(SlimError, match=r"is not an adapter folder|does not exist"):
            prepare_model(start_recipe(tiny("llama"), rows, folder).recipe)
    adapters: list[dict[str, Any]] = [{"init": "pissa"}, {"adaptive": {"target_rank": 2}}]
    for adapter in adapters:
        with pytest.raises(SlimError, match="both set the starting weights"):
            start_recipe(tiny("llama"), rows, tmp_path, **adapter)
    with pytest.raises(SlimError, match=r"adapter.init_from is set, and method=full"):
        start_recipe(tiny("llama"), rows, tmp_path, "full")


def test_a_resume_needs_the_adapter_that_it_started_from(
    tiny: TinyModels, rows: Path, tmp_path: Path
) -> None:
    base, out = tiny("llama"), tmp_path / "run"
    start = write_adapter(tmp_path / "a", base)
    finetune(start_recipe(base, rows, start, train={"steps": 3}), out, observer=Recorder())
    record = json.loads((out / "recipe.json").read_text())
    assert list(record["adapters"]) == [str(start)]
    start.rename(tmp_path / "kept")
    write_adapter(start, base)
    longer = start_recipe(base, rows, start, train={"steps": 5})
    with pytest.raises(SlimError, match=f"{start}: other contents"):
        finetune(longer, out, observer=Recorder(), resume=True)
    shutil.rmtree(start)
    (tmp_path / "kept").rename(start)
    finetune(longer, out, observer=Recorder(), resume=True)
    assert len(losses(out)) == 5
