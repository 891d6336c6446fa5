"""Every recipe on Alpaca: true to its header, and it trains a tiny model of its architecture."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_slim.cli import plan, recipes
from mlx_slim.config import library
from mlx_slim.config.load import load_recipe
from mlx_slim.planner.memory import predict
from mlx_slim.planner.shipped_models import SHIPPED_CONFIGS, model_config
from tests.support.tiny import TinyModels

# Those on Alpaca; recipes on tasks: test_task_recipes.py, on pairs: test_preference_recipes.py,
# with rewards: test_reward_recipes.py.
NAMES = [
    name
    for name in library.names("recipes")
    if not name.startswith(("tailored-", "tinyllm-", "sweep-"))
    and not name.endswith(("-dpo", "-orpo", "-kto", "-grpo"))
]
DISTILLED = [name for name in NAMES if name.startswith("distill-")]
TUNED = [name for name in NAMES if name not in DISTILLED]
ARCHITECTURE = {
    "tinyllama": "llama",
    "llama2": "llama-mha",
    "phi2": "phi",
    "mistral": "mistral",
    "smollm2": "llama-tied",
}


def test_the_promised_recipes_exist() -> None:
    methods = {
        "tinyllama": "full lora qlora",
        "phi2": "full lora qlora",
        "mistral": "lora qlora",
        "llama2": "lora qlora",
        "smollm2": "full lora qlora dora qat",
    }
    assert sorted(f"{m}-{k}" for m, kinds in methods.items() for k in kinds.split()) == TUNED
    assert DISTILLED == ["distill-on-policy-smollm2", "distill-smollm2"]


@pytest.mark.parametrize("name", NAMES)
def test_header_and_planner_agree(name: str) -> None:
    text = library.find("recipes", name).read_text(encoding="utf-8")
    assert plan.cost_header(name) in text, f"the header should say:\n{plan.cost_header(name)}"
    command = "distill" if name in DISTILLED else "train"
    assert f"mlx-slim {command} {name}" in text
    assert text.startswith("# ")


@pytest.mark.parametrize("name", NAMES)
def test_pinned_named_and_known(name: str) -> None:
    recipe = load_recipe(name).recipe
    kind = name.rsplit("-", 1)[1]
    expected = "full" if name in DISTILLED or kind == "qat" else kind
    assert recipe.method == expected
    assert recipe.quantize.qat == (kind == "qat")
    teachers = recipe.distill.teachers if recipe.distill else []
    for pin in [recipe.revision, *(teacher.revision for teacher in teachers)]:
        assert re.fullmatch(r"[0-9a-f]{40}", pin or "")
    assert recipe.model in SHIPPED_CONFIGS


def test_all_recipes_see_the_same_rows_in_steps_of_the_same_size() -> None:
    every = [load_recipe(name).recipe for name in NAMES]
    first = every[0]
    for recipe in every:
        assert recipe.data == first.data
        assert recipe.train.max_length == first.train.max_length
        assert recipe.train.epochs == first.train.epochs
        assert recipe.train.seed == first.train.seed
        assert recipe.train.batch_tokens * recipe.train.accumulate == 16_384
        if recipe.method != "full":
            assert recipe.adapter == load_recipe("smollm2-lora").recipe.adapter


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "alpaca.jsonl"
    words = ["red", "green", "blue", "one", "two", "three"]
    with path.open("w") as handle:
        for i in range(24):
            word = words[i % len(words)]
            row = {
                "instruction": f"Say {word}.",
                "input": word * (i % 2),
                "output": word * (i % 3 + 1),
            }
            handle.write(json.dumps(row) + "\n")
    return path


@pytest.mark.parametrize("name", TUNED)
def test_three_steps_end_to_end(name: str, tiny: TinyModels, rows: Path, tmp_path: Path) -> None:
    from mlx_lm import load

    from mlx_slim.events import Broadcast
    from mlx_slim.finetuning.run import finetune

    model = tiny(ARCHITECTURE[name.split("-")[0]])
    out = tmp_path / "run"
    overrides = [
        f"model={model}",
        f"data.path={rows}",
        "train.steps=3",
        "train.max_length=256",
        "train.batch_tokens=256",
        "train.accumulate=2",
        "data.validation=4",
    ]
    finetune(load_recipe(name, overrides), out, observer=Broadcast([]))
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "complete"
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == [1, 2, 3]
    if name.endswith(("full", "qat")):
        load(str(out / "model"))
    else:
        load(str(model), adapter_path=str(out / "adapters"))


@pytest.mark.parametrize("name", DISTILLED)
def test_three_steps_with_a_teacher_through_the_command(
    name: str, tiny: TinyModels, rows: Path, tmp_path: Path
) -> None:
    from mlx_lm import load

    from mlx_slim.cli import distill

    out = tmp_path / "run"
    words = [
        name,
        f"model={tiny('llama-tied')}",
        f"distill.teachers=[{{model: {tiny('llama')}}}]",
        f"data.path={rows}",
        "train.steps=3",
        "train.max_length=256",
        "train.batch_tokens=256",
        "data.validation=4",
        *("-o", str(out), "--quiet"),
    ]
    result = CliRunner().invoke(distill.command, words, catch_exceptions=False)
    assert result.exit_code == 0
    load(str(out / "model"))
    method = "on-policy" if "on-policy" in name else "logits"
    assert json.loads((out / "run.json").read_text())["distill"]["method"] == method
    dry = CliRunner().invoke(distill.command, [*words, "--dry-run"])
    assert "# command line" in dry.output
    assert 'teachers: [{"model"' in dry.output


def test_list_show_and_copy(tmp_path: Path) -> None:
    run = CliRunner().invoke
    listed = run(recipes.command, [])
    assert all(name in listed.output for name in NAMES)
    assert "_alpaca" not in listed.output
    assert "extends:" in run(recipes.command, ["phi2-lora"]).output
    path = tmp_path / "mine.yaml"
    assert run(recipes.command, ["phi2-lora", "--copy", str(path)]).exit_code == 0
    assert load_recipe(str(path)).recipe == load_recipe("phi2-lora").recipe
    assert path.read_text().startswith("# LoRA of Phi-2")
    assert "exists already" in str(
        run(recipes.command, ["phi2-lora", "--copy", str(path)]).exception
    )
    assert "not a .yaml" in str(run(recipes.command, ["phi2-lora", "--copy", "x"]).exception)
    assert run(recipes.command, ["--copy", str(path)]).exit_code != 0


def test_plan_prints_fits_and_the_cheapest_knob() -> None:
    run = CliRunner().invoke
    result = run(plan.command, ["tinyllama-lora", "train.dtype=bfloat16", "--json"])
    record = json.loads(result.stdout)
    assert set(record) >= {
        *("predicted_peak_bytes", "budget_bytes", "fits", "predicted_seconds", "disk_bytes"),
        *("breakdown", "suggestions"),
    }
    assert set(record["breakdown"]) == {
        *("weights", "gradients", "optimizer", "activations", "logits", "answers", "loading"),
    }
    assert sum(record["breakdown"].values()) == record["predicted_peak_bytes"]
    result = run(plan.command, ["tinyllama-lora", "--budget", "6GB"])
    assert "does NOT fit in 6.00 GB" in result.stdout
    assert "to make it fit, cheapest first" in result.stdout
    # What is proposed next fits.
    assert re.search(
        r"mlx-slim train tinyllama-lora (train|method)\S*=\S+ .*-o runs/", result.stderr
    )
    assert "no recipe is named" in str(run(plan.command, []).exception)


def test_a_suggestion_is_an_override_that_keeps_its_promise() -> None:
    recipe = load_recipe("tinyllama-lora").recipe
    config, _ = model_config(recipe)
    prediction = predict(config, recipe, gpu=True, budget=int(4e9))
    assert not prediction.fits
    assert prediction.suggestions[0].predicted_peak_bytes <= 4e9
    for suggestion in prediction.suggestions[:3]:
        changed = load_recipe("tinyllama-lora", suggestion.set.split()).recipe
        again = predict(config, changed, gpu=True, budget=int(4e9), suggest=False)
        assert again.predicted_peak_bytes == suggestion.predicted_peak_bytes
