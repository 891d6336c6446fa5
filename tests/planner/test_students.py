"""The models that a distillation recipe names, and the cost of two students."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_slim.config.load import load_recipe
from mlx_slim.errors import SlimError
from mlx_slim.planner.memory import Prediction
from mlx_slim.planner.run import plan
from mlx_slim.planner.students import with_model


def test_teachers_cost_the_student_a_few_columns_and_two_students_add_up(
    tiny: Callable[..., Path],
) -> None:
    def cost(*overrides: str) -> Prediction:
        words = [f"model={tiny('llama')}", "revision=null", *overrides]
        return plan(load_recipe("smollm2-lora", words).recipe, budget="4GB")[0]

    alone = cost()
    other = cost(f"model={tiny('llama-tied')}")
    student = cost(f"distill.teachers=[{{model: {tiny('mistral')}}}]", "distill.temperature=2")
    assert alone.predicted_peak_bytes < student.predicted_peak_bytes
    assert student.breakdown["weights"] == alone.breakdown["weights"]
    second = f"{{method: mutual, teachers: [{{model: {tiny('llama-tied')}}}]}}"
    both = cost(f"distill={second}")
    for part in ("weights", "gradients", "optimizer"):
        assert both.breakdown[part] == alone.breakdown[part] + other.breakdown[part]
    assert both.predicted_peak_bytes >= alone.predicted_peak_bytes + other.predicted_peak_bytes
    assert both.predicted_peak_bytes == sum(both.breakdown.values())
    twin = cost("distill={method: mutual}")  # without a name the second student is the model too
    assert twin.breakdown["weights"] == 2 * alone.breakdown["weights"]


def test_a_teacher_without_a_model_is_the_students_original(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    words = [f"model={tiny('llama')}", "revision=null", "distill.teachers=[{weight: 2}]"]
    recipe = load_recipe("smollm2-lora", words).recipe
    assert recipe.distill is not None
    (unnamed,) = recipe.distill.teachers
    assert with_model(unnamed, recipe).model == str(tiny("llama"))
    pruned = tmp_path / "pruned"
    pruned.mkdir()
    small = recipe.model_copy(update={"model": str(pruned)})
    (pruned / "prune.json").write_text('{"source": "owner/name", "revision": "abc"}')
    teacher = with_model(unnamed, small)
    assert (teacher.model, teacher.revision, teacher.weight) == ("owner/name", "abc", 2)
    (pruned / "prune.json").write_text('{"source": "folder"}')
    with pytest.raises(SlimError, match="pruned from a folder called folder"):
        with_model(unnamed, small)
