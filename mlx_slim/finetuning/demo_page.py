"""What the demo leaves to look at and to type: the page of a run with scored answers, next steps.

Invariant: prompts and answers are those that were scored. Try it: ``mlx-slim demo``.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from mlx_slim.artifacts import read_records
from mlx_slim.finetuning.answers import Answered, write_answers
from mlx_slim.finetuning.report import write_page
from mlx_slim.finetuning.run_dir import STATE_FILE, read_result
from mlx_slim.next_steps import YOUR_ROWS, NextStep, look_at, step, use_model
from mlx_slim.reading import read_object

TASK = "demo_exact_match"  # as in `mlx-slim eval --task`
_SHOWN = 3  # answers
_MESSAGE = "pls log vitamins on wednesday, 20,55chf with jonas"


def write_answered_page(run: Path, rows: Path, before: Path, after: Path) -> None:
    """Write the page of a run again, with scored answers of the base and of the tuned model.

    Args:
        run: The run folder.
        rows: File of the rows that were scored.
        before: File of the base's answers.
        after: File of the tuned model's.
    """
    prompts = [row["prompt"] for row in read_records(rows)]
    samples = (read_records(file) for file in (before, after))
    answered = [
        Answered(
            prompts[base["doc_id"]], str(base["target"]), base["generation"], tuned["generation"]
        )
        for base, tuned in itertools.islice(zip(*samples, strict=True), _SHOWN)
    ]
    write_answers(run, answered)
    write_page(run)


def demo_steps(run: Path) -> list[NextStep]:
    """Return what one would type after the demo, with the run of its best method."""
    result = read_result(run)
    system = read_object(run / STATE_FILE, recipe=dict)["recipe"]["data"]["system"] or ""
    adapted = result.artifact == "adapters"
    model, adapters = (result.model, [run / "adapters"]) if adapted else (run / "model", [])
    on = [word for one in adapters for word in ("--adapter", one)]
    message = ["--system", system, "--prompt", _MESSAGE]
    yours = [f"data.path={YOUR_ROWS}", "-o", "runs/mine"]
    return [
        look_at(run / "report.html"),
        step("try it on a message", "mlx-slim", "generate", model, *on, *message),
        *use_model(model, adapters, name=run, task=TASK),
        step("train it on your rows", "mlx-slim", "train", "smollm2-lora", *yours),
    ]
