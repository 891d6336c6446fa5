"""Recipes that train on tasks: true to their headers, three steps, and never on what is scored."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from mlx_slim.cli import plan
from mlx_slim.config import library
from mlx_slim.config.load import load_recipe
from mlx_slim.config.schema import Recipe
from mlx_slim.distillation.run import distill
from mlx_slim.evaluation.tasks.rows import load_rows
from mlx_slim.evaluation.tasks.spec import find_task
from mlx_slim.evaluation.tasks.training_rows import finder, question_keys
from mlx_slim.finetuning.run import finetune
from mlx_slim.planner.run import plan as planned
from mlx_slim.planner.shipped_models import SHIPPED_CONFIGS
from tests.support.runs import Recorder
from tests.support.tiny import TinyModels, fixed_answer_model

TASKS = ("arc-challenge", "arc-easy", "bioasq", "hellaswag", "openbookqa", "pubmedqa")
TAILORED = [f"tailored-{task}" for task in TASKS]
TINYLLM = [f"tinyllm-{task}" for task in ("arc", "openbookqa", "pubmedqa")]
ROWS = {("pubmedqa", "test"): 560}  # its recipes skip 500


def text_of(name: str) -> str:
    return library.find("recipes", name).read_text(encoding="utf-8")


def scored(name: str) -> tuple[str, int | None]:
    """Return task and ``--limit`` of the header's Score line."""
    line = re.search(r"# Score: .*", text_of(name))
    assert line
    words = shlex.split(line[0])
    limit = int(words[words.index("--limit") + 1]) if "--limit" in words else None
    return words[words.index("--task") + 1], limit


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small rows of every task, in every split that the hub has."""
    folder = tmp_path_factory.mktemp("mirror")
    for task in (name.replace("-", "_") for name in TASKS):
        (folder / task).mkdir()
        scored = "validation" if task == "hellaswag" else "test"
        for split in (scored,) if task == "pubmedqa" else (scored, "train"):
            question = "question_stem" if task == "openbookqa" else "question"
            rows = [
                {
                    question: f"{split} {i} of {task}?",
                    "choices": {"text": [f"one {i}", f"two {i}"], "label": ["A", "B"]},
                    "answerKey": "AB"[i % 2],
                    "context": {"contexts": [f"Abstract {i}."]},
                    "final_decision": ("yes", "no", "maybe")[i % 3],
                    **{"activity_label": task, "ctx_a": f"{split} {i} is", "ctx_b": "seen"},
                    **{"endings": [f"once {i}.", f"twice {i}."], "label": str(i % 2)},
                    **{"body": f"{split} {i}?", "type": "yesno", "exact_answer": "yes"},
                    "snippets": [{"text": f"Passage {i}."}],
                }
                for i in range(ROWS.get((task, split), 60))
            ]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / task / f"{split}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def speakers(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("speakers")
    return [
        fixed_answer_model(folder / "flows", "It flows."),
        fixed_answer_model(folder / "mine", "By me!"),
    ]


def test_the_promised_recipes_exist() -> None:
    assert set(TAILORED + TINYLLM) <= set(library.names("recipes"))


@pytest.mark.parametrize("name", TAILORED + TINYLLM)
def test_header_and_planner_agree(name: str) -> None:
    text = text_of(name)
    assert plan.cost_header(name) in text, f"the header should say:\n{plan.cost_header(name)}"
    command = "distill" if name in TINYLLM else "train"
    assert f"mlx-slim {command} {name}" in text
    recipe = load_recipe(name).recipe
    assert recipe.model in SHIPPED_CONFIGS and re.fullmatch(r"[0-9a-f]{40}", recipe.revision or "")
    assert recipe.data.template == "plain"  # tuned as it is asked


@pytest.mark.parametrize("name", TAILORED)
def test_fifty_shots(name: str) -> None:
    (source,) = load_recipe(name).recipe.data.sources
    assert source.limit == 50
    assert source.task == scored(name)[0]


@pytest.mark.parametrize("name", TINYLLM)
def test_teachers_give_reasons(name: str) -> None:
    config = load_recipe(name).recipe.distill
    assert config is not None
    assert config.method == "rationales"
    assert len(config.teachers) == 2
    pins = [teacher.revision or "" for teacher in config.teachers]
    assert all(re.fullmatch(r"[0-9a-f]{40}", pin) for pin in pins)
    assert load_recipe(name).recipe.train.learning_rate == 5e-5


@pytest.mark.parametrize("name", TAILORED + TINYLLM)
def test_it_can_be_planned_with_its_rows(
    name: str, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_SLIM_DATA", str(mirror))
    recipe = load_recipe(name).recipe
    prediction, _ = planned(recipe, mac="m2-16gb")
    assert prediction.fits
    # Some are held out; the others are learned with an answer and two reasons each.
    rows = 50 if name in TAILORED else 3 * (60 - 32)
    assert f"{rows} rows of about" in prediction.tokens_basis


@pytest.mark.parametrize("name", TAILORED + TINYLLM)
def test_no_row_is_trained_on_and_scored(
    name: str, mirror: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLX_SLIM_DATA", str(mirror))
    task, limit = scored(name)
    assert not trained(load_recipe(name).recipe, tmp_path) & scored_questions(task, limit)


@pytest.mark.parametrize("name", sorted({*TAILORED, *TINYLLM} - {"tailored-bioasq"}))
def test_nor_with_the_test_split_alone(
    name: str, data_mirror: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLX_SLIM_DATA", str(data_mirror))
    task, limit = scored(name)
    overrides = []
    if way := re.search(r"# Mirror: .*?'(data\.path=.*)'\n#.*--limit (\d+)", text_of(name)):
        overrides, limit = [way[1]], int(way[2])
    recipe = load_recipe(name, overrides).recipe
    assert not trained(recipe, tmp_path) & scored_questions(task, limit)
    assert trained(recipe, tmp_path) <= scored_questions(task, None)


def trained(recipe: Recipe, folder: Path) -> set[str]:
    find = finder(folder)
    keys = {raw.value["key"] for source in recipe.data.sources for raw in find(source)}
    assert keys
    return keys


def scored_questions(task: str, limit: int | None) -> set[str]:
    spec = find_task(task)
    return set(question_keys(spec, load_rows(spec), limit))


OVERRIDES = ["revision=null", "train.steps=3", "train.max_length=256", "train.batch_tokens=512"]


@pytest.mark.parametrize("name", TAILORED)
def test_three_steps_of_tailoring(
    name: str, mirror: Path, tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLX_SLIM_DATA", str(mirror))
    out = tmp_path / "run"
    overrides = [f"model={tiny('llama-tied')}", *OVERRIDES]
    result = finetune(load_recipe(name, overrides), out, observer=Recorder())
    assert result.ledger["totals"]["rows_used"] == 50
    declared = json.loads((out / "training_rows.json").read_text())["sources"][0]
    assert len(declared["rows"]) == 50
    assert (out / "run.json").exists()


@pytest.mark.parametrize("name", TINYLLM)
def test_three_steps_of_teaching(
    name: str,
    mirror: Path,
    tiny: TinyModels,
    speakers: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("MLX_SLIM_DATA", str(mirror))
    out = tmp_path / "run"
    teachers = ", ".join(f"{{model: {folder}}}" for folder in speakers)
    overrides = [
        f"model={tiny('llama-tied')}",
        *OVERRIDES,
        f"distill.teachers=[{teachers}]",
        "data.max_rows=12",
        "data.validation=2",
    ]
    distill(load_recipe(name, overrides), out, observer=Recorder())
    assert len((out / "answers.jsonl").read_text().splitlines()) == 20
    first = json.loads((out / "answers.jsonl").read_text().splitlines()[0])
    assert "Options:" in first["prompt"] and "Correct answer:" in first["prompt"]
    assert (out / "run.json").exists()
