"""The demo end to end on a tiny model, twice: the second run reuses everything."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_slim.claims import LOCK_FILE
from mlx_slim.cli.main import command
from mlx_slim.data import sources
from mlx_slim.data.ledger import SourceLedger
from mlx_slim.data.pipeline import Pipeline
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.jobs import TaskJob
from mlx_slim.evaluation.plan import EvalOptions, _task_job, read_tasks
from mlx_slim.evaluation.scoring.requests import max_length
from mlx_slim.events import Notice
from mlx_slim.finetuning import demo as workflow
from mlx_slim.finetuning.run_dir import RUN
from mlx_slim.models.load import load
from mlx_slim.models.row_limits import row_limit
from tests.support.runs import Recorder

# The byte tokenizer makes long rows.
SMALL = ("train.steps=2", "train.max_length=512", "train.batch_tokens=1024", "data.max_rows=20")


class _Heard(Recorder):
    def watch(self, title: str):
        return contextlib.nullcontext(self)

    @property
    def notices(self) -> list[str]:
        return [event.message for event in self.events if isinstance(event, Notice)]


def test_all_methods_then_nothing_left_to_do(tiny: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "demo"
    methods = ["qlora", "lora", "dora", "full"]
    first, again = _Heard(), _Heard()
    arguments = {"model": str(tiny()), "limit": 3, "overrides": SMALL}
    rows = workflow.demo(out, methods, watch=first.watch, **arguments)
    assert [row.method for row in rows] == methods
    for row in rows:
        assert row.before.n == row.after.n == 3
        assert row.tokens_per_second > 0 and row.peak_memory_bytes > 0 and row.tuned_bytes > 0
    by_method = {row.method: row for row in rows}
    assert by_method["full"].trainable == by_method["full"].total
    assert by_method["qlora"].base_bytes < by_method["lora"].base_bytes
    assert by_method["lora"].before == by_method["dora"].before
    record = json.loads((out / "results.json").read_text())
    assert list(record["methods"]) == methods
    report = (out / "report.md").read_text()
    assert all(f"| {method} |" in report for method in methods)
    answers = (out / "scores" / "qlora" / "samples_demo_exact_match.jsonl").read_text().splitlines()
    assert [json.loads(line)["doc_id"] for line in answers] == [0, 1, 2]

    files = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert workflow.demo(out, methods, watch=again.watch, **arguments) == rows
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == files
    assert sum("reused" in line for line in again.notices) >= 5


def test_prompts_are_the_training_prompts(tiny: Callable[..., Path]) -> None:
    loaded = load(tiny())
    recipe = workflow.demo_recipe(
        "lora", tiny(), (*SMALL, f"data.path={workflow.data_files()[1]}")
    ).recipe
    (task,) = read_tasks([workflow.TASK], EvalOptions())
    longest = max_length(loaded.config, loaded.tokenizer)
    limit = row_limit(loaded.config)
    job = _task_job(task, EvalOptions(), loaded.tokenizer, longest, limit, [])
    assert isinstance(job, TaskJob)
    questions = job.questions
    prompts = [job.encoder.prompt(question.context, 1) for question in questions]
    assert len(questions) == 100
    (config,) = recipe.data.sources
    source = sources.find(config)
    pipeline = Pipeline(recipe.data, loaded.tokenizer, max_length=recipe.train.max_length)
    rows = pipeline.rows(source, config, SourceLedger(source.name, source.kind, 1.0, []))
    for row, prompt, question in zip(rows, prompts, questions, strict=True):
        assert row.tokens.ids_T[: len(prompt)].tolist() == prompt
        assert row.tokens.supervised_T.argmax() == len(prompt)
        assert row.example.fields["completion"] == question.target
    assert recipe.data.system in loaded.tokenizer.decode(prompts[0])


@pytest.mark.parametrize("override", ["data.system=Other", "data.template=alpaca"])
def test_other_prompts_than_the_task_s_are_refused(
    tiny: Callable[..., Path], tmp_path: Path, override: str
) -> None:
    out = tmp_path / "demo"
    with pytest.raises(SlimError, match=r"data\.\w+ is '\w+', and the demo scores with"):
        workflow.demo(out, ["lora"], model=str(tiny()), overrides=[override], watch=_Heard().watch)
    assert not out.exists()


def test_a_changed_limit_scores_again(tiny: Callable[..., Path], tmp_path: Path) -> None:
    heard = _Heard()
    arguments = {"model": str(tiny()), "overrides": SMALL, "watch": heard.watch}
    for limit in (1, 2):
        (row,) = workflow.demo(tmp_path, ["lora"], limit=limit, **arguments)
        assert row.before.n == row.after.n == limit


def test_what_a_kill_left_before_the_start_is_no_obstacle(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "lora"
    (run / "tokens").mkdir(parents=True)
    (run / LOCK_FILE).write_text(json.dumps({"command": RUN.command, "before": RUN.before}))
    heard = _Heard()
    (row,) = workflow.demo(
        tmp_path, ["lora"], model=str(tiny()), limit=2, overrides=SMALL, watch=heard.watch
    )
    assert row.after.n == 2


def test_a_changed_recipe_is_refused_over_an_old_run(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    heard = _Heard()
    arguments = {"model": str(tiny()), "limit": 2, "watch": heard.watch}
    workflow.demo(tmp_path, ["lora"], overrides=SMALL, **arguments)
    with pytest.raises(SlimError, match=r"train\.learning_rate"):
        workflow.demo(
            tmp_path, ["lora"], overrides=(*SMALL, "train.learning_rate=0.1"), **arguments
        )


def test_unknown_method_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(SlimError, match="no method 'qlra'") as caught:
        workflow.demo(tmp_path / "demo", ["qlra"], watch=_Heard().watch)
    assert "qlora" in caught.value.hint
    assert not (tmp_path / "demo").exists()


def test_mistyped_key_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(SlimError, match=r"train\.stepz"):
        workflow.demo(tmp_path / "demo", overrides=["train.stepz=3"], watch=_Heard().watch)
    assert not (tmp_path / "demo").exists()


def test_command_prints_the_table(tiny: Callable[..., Path], tmp_path: Path) -> None:
    words = ["demo", "--model", str(tiny()), "--methods", "lora", "--limit", "2", "--quiet"]
    done = CliRunner().invoke(command, [*words, "-o", str(tmp_path / "demo"), *SMALL])
    assert done.exit_code == 0, done.output
    for heading in workflow.HEADINGS[1:]:
        assert heading in done.output
    assert "report.md" in done.output
