"""Matrix files: what they ask for, and what is said about wrong ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import yaml
from click.testing import CliRunner
from mlx.utils import tree_flatten

from mlx_slim.cli.main import command
from mlx_slim.compare.matrix import load_matrix
from mlx_slim.compare.predict import plan
from mlx_slim.config import library
from mlx_slim.config.schema import QuantizeConfig
from mlx_slim.errors import SlimError
from mlx_slim.models.load import load
from mlx_slim.models.tensors import folder_tensors
from mlx_slim.quantization.apply import quantize_model
from mlx_slim.units import human_bytes

SMALL = {
    "title": "small",
    "models": {"toy": {"source": "some/where"}},
    "methods": {
        "base": {"kind": "base"},
        "lora": {"recipe": {"method": "lora"}, "learning_rates": [1e-4, 1e-3]},
        "qlora": {"recipe": {"method": "qlora"}},
        "fused": {"kind": "fused", "of": "qlora"},
    },
    "tasks": [{"task": "arc_easy", "limit": 5}],
}


def write(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    return path


def test_shipped_matrices_and_no_recipe_among_them() -> None:
    assert library.names("matrices") == [
        "matrix-14",
        "matrix-7b",
        "matrix-slim",
        "matrix-tiny",
        "matrix-tinyllm",
    ]
    assert not [name for name in library.names("recipes") if name.startswith("matrix")]
    with pytest.raises(SlimError, match="no recipe is called 'matrix-14'"):
        library.find("recipes", "matrix-14")
    listed = CliRunner().invoke(command, ["compare"]).output.split()
    assert listed == library.names("matrices")


def test_fourteen_variants_and_their_controls() -> None:
    layout = load_matrix("matrix-14")
    assert not layout.refused
    variants = {
        (cell.model, cell.method)
        for cell in layout.cells
        if cell.method in ("base", "full", "lora", "qlora")
    }
    assert len(variants) == 14
    assert {model for model, method in variants if method == "full"} == {"tinyllama", "phi2"}
    controls = {cell.method for cell in layout.cells} - {"base", "full", "lora", "qlora"}
    assert controls == {"base-4bit", "qlora-fused"}
    assert {(model, method) for model, method, _ in layout.omitted} == {
        ("mistral", "full"),
        ("llama2", "full"),
    }
    assert {cell.seed for cell in layout.cells if cell.kind == "tuned"} == {0, 1, 2}
    assert all(len(cell.rates) > 1 for cell in layout.cells if cell.kind == "tuned")


def test_distillation_methods_and_pinned_teachers() -> None:
    layout = load_matrix("matrix-tinyllm")
    assert not layout.refused
    distillation = {cell.method: cell.recipe.recipe.distill for cell in layout.cells}
    methods = {name: config.method for name, config in distillation.items() if config is not None}
    assert methods == {
        "one-teacher": "rationales",
        "two-teachers": "rationales",
        "taught": "logits",
        "mutual": "mutual",
    }
    one, two = (
        config.teachers
        for name in ("one-teacher", "two-teachers")
        if (config := distillation[name]) is not None
    )
    assert two[0] == one[0] and len(two) == 2
    assert all(re.fullmatch(r"[0-9a-f]{40}", teacher.revision or "") for teacher in two)
    # The two students of the last cell cost what two runs cost.
    lines = {line.cell: line for line in plan(layout)}
    alone, both = (lines[f"smollm2-{name}-s0"].peak_bytes for name in ("taught", "mutual"))
    assert alone is not None and both is not None and both > 1.9 * alone


@pytest.mark.parametrize("name", library.names("matrices"))
def test_all_cells_see_the_same_rows_in_steps_of_the_same_size(name: str) -> None:
    cells = [cell for cell in load_matrix(name).cells if cell.kind == "tuned"]
    first = cells[0].recipe.recipe
    for cell in cells:
        recipe = cell.recipe.recipe
        assert recipe.data == first.data
        assert recipe.adapter == first.adapter
        size = recipe.train.batch_tokens * recipe.train.accumulate
        assert size == first.train.batch_tokens * first.train.accumulate
        ignored = {"seed", "batch_tokens", "accumulate", "learning_rate"}
        assert recipe.train.model_dump(exclude=ignored) == first.train.model_dump(exclude=ignored)


def test_overrides_and_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "m.yaml")
    layout = load_matrix(str(path), ["recipe.train.steps=7", "seeds=[3, 4]"], limit=2)
    tuned = [cell for cell in layout.cells if cell.method == "lora"]
    assert [cell.name for cell in tuned] == ["toy-lora-s3", "toy-lora-s4"]
    assert {cell.recipe.recipe.train.steps for cell in layout.cells} == {7}
    assert layout.matrix.tasks[0].limit == 2
    fused = next(cell for cell in layout.cells if cell.name == "toy-fused-s4")
    assert fused.parent == "toy-qlora-s4"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modles": {}}, "did you mean 'models'"),
        ({"seeds": ["x"]}, "seeds.0"),
        ({"methods": {"lora": {"kind": "tunde"}}}, "one of base, quantized, pruned, tuned, fused"),
        ({"models": {"a b": {"source": "x"}}}, "a name has letters"),
        (
            {"models": {"a": {"source": "x", "recipe": {"data": {"path": "y"}}}}},
            "all cells share one data set",
        ),
        ({"omit": [{"model": "ty", "method": "lora", "why": "x"}]}, "did you mean 'toy'"),
        ({"tasks": [{"task": "arc_easy"}, {"task": "arc_easy"}]}, "listed twice"),
        ({"tasks": []}, "tasks"),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(SlimError) as caught:
        load_matrix(str(write(tmp_path / "m.yaml", **changes)))
    assert message in str(caught.value)


def test_a_wrong_cell_is_named_and_the_others_stay(tmp_path: Path) -> None:
    models = {
        "toy": {"source": "x", "methods": ["base", "loar"]},
        "a": {"source": "x", "methods": ["b-c"]},
        "a-b": {"source": "x", "methods": ["c"]},
        "bad": {"source": "x", "methods": ["lora"], "recipe": {"train": {"stepz": 3}}},
    }
    methods = {**SMALL["methods"], "b-c": {"kind": "base"}, "c": {"kind": "base"}}
    layout = load_matrix(str(write(tmp_path / "m.yaml", models=models, methods=methods)))
    refused = dict(layout.refused)
    assert "did you mean 'lora'" in refused["toy-loar"]
    assert "two cells have this name" in refused["a-b-c"]
    assert "train.stepz" in refused["bad-lora-s0"]
    assert [cell.name for cell in layout.cells] == ["toy-base", "a-b-c"]


@pytest.mark.parametrize(
    ("fused", "message"),
    [
        ({"kind": "fused"}, "no tuned method"),
        ({"kind": "fused", "of": "qlroa"}, "did you mean 'qlora'"),
        ({"kind": "fused", "of": "base"}, "no tuned method above it (known: full, qlora)"),
        ({"kind": "fused", "of": "full"}, "no adapters to fuse"),
    ],
)
def test_what_cannot_be_fused(tmp_path: Path, fused: Any, message: str) -> None:
    methods = {
        "base": {"kind": "base"},
        "full": {"recipe": {"method": "full"}},
        "qlora": {"recipe": {"method": "qlora"}},
        "fused": fused,
    }
    layout = load_matrix(str(write(tmp_path / "m.yaml", methods=methods)))
    assert message in dict(layout.refused)["toy-fused-s0"]


def test_values_of_other_schemas_may_be_true_or_false(tmp_path: Path) -> None:
    methods = {
        "narrow": {"kind": "pruned", "prune": {"ratio": 0.5, "heads": False}},
        "qat": {"recipe": {"method": "full", "quantize": {"qat": True}}},
    }
    layout = load_matrix(str(write(tmp_path / "m.yaml", methods=methods)))
    assert not layout.refused
    assert layout.cells[1].recipe.recipe.quantize.qat is True


def test_cells_that_start_from_another_cell(tmp_path: Path) -> None:
    methods = {
        "base": {"kind": "base"},
        "small": {"kind": "pruned", "prune": {"ratio": 0.5}},
        "small-lora": {"of": "small", "recipe": {"method": "lora"}},
        "small-4bit": {"kind": "quantized", "of": "small"},
        "small-full": {"of": "small", "recipe": {"method": "full"}},
        "full-4bit": {"kind": "quantized", "of": "small-full"},
    }
    layout = load_matrix(str(write(tmp_path / "m.yaml", methods=methods)), ["seeds=[0, 1]"])
    assert not layout.refused
    assert {cell.name: cell.parent for cell in layout.cells} == {
        "toy-base": None,
        "toy-small": None,
        "toy-small-lora-s0": "toy-small",
        "toy-small-lora-s1": "toy-small",
        "toy-small-4bit": "toy-small",
        "toy-small-full-s0": "toy-small",
        "toy-small-full-s1": "toy-small",
        "toy-full-4bit-s0": "toy-small-full-s0",
        "toy-full-4bit-s1": "toy-small-full-s1",
    }


@pytest.mark.parametrize(
    ("child", "message"),
    [
        ({"of": "smal"}, "did you mean 'small'"),
        ({"of": "base"}, "no pruned, fused or tuned method above it"),
        ({"of": "later"}, "no pruned, fused or tuned method above it"),
        ({"of": "lora"}, "fuse it first"),
        ({"kind": "base", "of": "small"}, "kind: base is the model itself"),
    ],
)
def test_what_nothing_can_start_from(tmp_path: Path, child: Any, message: str) -> None:
    methods = {
        "base": {"kind": "base"},
        "small": {"kind": "pruned", "prune": {"ratio": 0.5}},
        "lora": {"recipe": {"method": "lora"}},
        "child": child,
        "later": {"kind": "pruned", "prune": {"ratio": 0.5}},
    }
    layout = load_matrix(str(write(tmp_path / "m.yaml", methods=methods)))
    assert message in next(why for name, why in layout.refused if name.startswith("toy-child"))


def test_plan_says_what_runs_what_does_not_fit_and_why(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        command, ["compare", "matrix-14", "--dry-run", "budget=20GB", "seeds=[0]", "--limit", "10"]
    )
    assert done.exit_code == 0, done.output
    assert "tinyllama-lora-s0" in done.output
    assert "cells, about" in done.output
    assert "omitted: mistral-full: full fine-tuning" in done.output
    assert "omitted: phi2-full-s0: needs" in done.output
    assert "the budget is 20.0 GB" in done.output


def test_rows_that_are_not_there_are_no_matter_to_cells_that_train_on_none(
    tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    rows = {"data": {"path": str(tmp_path / "gone.jsonl")}}
    methods = {"base": {"kind": "base"}}
    models = {"toy": {"source": str(tiny("llama"))}}
    file = write(tmp_path / "m.yaml", recipe=rows, models=models, methods=methods)
    (line,) = plan(load_matrix(str(file)))
    assert not line.why_not and line.peak_bytes


def test_what_is_only_scored_must_fit_too_at_the_bits_that_it_has(
    tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    methods = {
        "base": {"kind": "base"},
        "base-4bit": {"kind": "quantized"},
        "small": {"kind": "pruned", "prune": {"ratio": 0.5}},
        "small-full": {"of": "small", "recipe": {"method": "full"}},
        "full-4bit": {"kind": "quantized", "of": "small-full"},
    }
    models = {"toy": {"source": str(tiny("llama"))}}
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    data = {"path": str(tmp_path / "rows.jsonl")}
    recipe = {"data": data, "quantize": {"group_size": 32}, "train": {"dtype": "float32"}}
    file = str(write(tmp_path / "m.yaml", recipe=recipe, models=models, methods=methods))

    def planned(budget: int) -> dict[str, Any]:  # of a Line
        return {line.cell: line for line in plan(load_matrix(file, [f"budget={budget}"]))}

    lines = planned(10**9)
    assert not any(line.why_not for line in lines.values())
    dense = sum(t.nbytes for t in folder_tensors(tiny("llama")).values())
    rounded = load(tiny("llama"), dtype=mx.float32)
    quantize_model(rounded.model, rounded.config, QuantizeConfig(group_size=32))
    weights: dict[str, mx.array] = dict(tree_flatten(rounded.model.parameters()))
    packed = sum(value.nbytes for value in weights.values())
    peak, small = (lines[f"toy-{name}"].peak_bytes for name in ("base", "base-4bit"))
    assert peak > dense and small > packed  # keys and values of the questions besides
    assert peak - small == pytest.approx(dense - packed, rel=0.02)
    assert dense < lines["toy-small"].peak_bytes < peak  # cut from it, with smaller caches

    lines = planned((peak + small) // 2)
    assert lines["toy-base"].why_not.startswith(f"needs {human_bytes(peak)[:3]}")
    assert not lines["toy-base-4bit"].why_not
    assert lines["toy-small"].why_not.startswith("needs")
    assert lines["toy-small-full-s0"].why_not == "toy-small is omitted"
    assert lines["toy-full-4bit-s0"].why_not == "toy-small-full-s0 is omitted"
    assert planned(small - 1)["toy-base-4bit"].why_not.startswith("needs")
