"""``mlx-slim tasks``: the evaluation tasks, and a task's first prompt as the model reads it.

Invariant: what is shown is built by the code that scores; nothing is written. Rows that are not
on this machine are reported, and the rest is shown; an invalid row is an error, as in scoring.
Try it: ``mlx-slim tasks``, ``mlx-slim tasks mmlu_anatomy --num-fewshot 1``.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from mlx_slim.cli.options import Whole, show_columns, show_next
from mlx_slim.config.values import MOST_SHOTS
from mlx_slim.errors import SlimError
from mlx_slim.next_steps import score, step
from mlx_slim.reading import JsonObject

if TYPE_CHECKING:
    from mlx_slim.evaluation.tasks.prompts import Chat, Question
    from mlx_slim.evaluation.tasks.spec import Task


def _rows(task: Task, data_dir: str | None) -> int | None:
    """Return the number of rows on this machine; None if they are missing."""
    from mlx_slim.evaluation.tasks.rows import count_rows

    try:
        return count_rows(task, data_dir)
    except SlimError:
        return None  # `tasks NAME` says why


def _list(data_dir: str | None, as_json: bool) -> None:
    from mlx_slim.evaluation.tasks.spec import list_tasks, suites

    tasks = list_tasks()
    if as_json:
        records = [{**_record(task), "rows": _rows(task, data_dir)} for task in tasks]
        result = {"schema_version": 1, "tasks": records, "suites": suites()}
        click.echo(json.dumps(result, indent=2))
        return
    table = [("task", "version", "kind", "rows", "shots", "metrics", "licence")]
    for task in tasks:
        rows = _rows(task, data_dir)
        shown = "absent" if rows is None else f"{rows:,}"
        kind, shots = task.kind.replace("multiple_", ""), str(task.num_fewshot)
        first, *others = task.metrics
        table.append((task.name, str(task.version), kind, shown, shots, first, task.spec.licence))
        table += [("", "", "", "", "", metric, "") for metric in others]
    show_columns(table, right=("version", "rows", "shots"))
    for name, members in suites().items():
        shots = ", ".join(f"{task} {number}-shot" for task, number in members.items())
        click.echo(f"suite {name}: {shots}")
    for task in tasks:
        if task.subtasks:
            click.echo(
                f"{task.name} has {len(task.subtasks)} subtasks, each a task: "
                f"{task.name}_{task.subtasks[0]} … {task.name}_{task.subtasks[-1]}"
            )
    click.echo("a task of your own is one YAML file: mlx-slim tasks mine.yaml")
    show_next(
        step("see its first prompt", "mlx-slim", "tasks", tasks[0].name),
        score("MODEL", out="runs/scores"),
    )


def _record(task: Task) -> JsonObject:
    spec = task.spec.model_dump(exclude_defaults=True, mode="json")
    properties = {"name": task.name, "version": task.version, "kind": task.kind}
    properties |= {"num_fewshot": task.num_fewshot, "metrics": list(task.metrics)}
    return {**spec, **properties, "parts": list(task.subtasks)}


def _show(task: Task, data_dir: str | None, num_fewshot: int | None, as_json: bool) -> None:
    from mlx_slim.evaluation.tasks.prompts import build_questions
    from mlx_slim.evaluation.tasks.rows import RowsAbsent, load_rows

    shots = task.num_fewshot if num_fewshot is None else num_fewshot
    missing: list[str] = []
    task_rows, question = None, None
    try:
        task_rows = load_rows(task, data_dir)
        try:
            question = build_questions(task, task_rows, shots, 1, chat=_roles(task))[0]
        except RowsAbsent as error:  # of the examples
            missing.append(str(error))
            shots = 0
            question = build_questions(task, task_rows, shots, 1, chat=_roles(task))[0]
    except RowsAbsent as error:
        missing.append(str(error))
    if as_json:
        record = {"schema_version": 1, **_record(task)}
        if task_rows:
            record |= {
                "found": task_rows.source,
                "rows": len(task_rows.rows),
                "checksum": task_rows.checksum,
            }
        first = _first(question, shots) if question else None
        click.echo(json.dumps({**record, "first": first, "missing": missing}, indent=2))
        return
    click.echo(task.file.read_text(encoding="utf-8").rstrip() + "\n")
    part = f", subtask {task.part} of {task.spec.name}" if task.part else ""
    click.echo(f"task      {task.name}{part}, version {task.version}")
    click.echo(f"metrics   {', '.join(task.metrics)}")
    click.echo(f"shots     {task.num_fewshot}, unless --num-fewshot says otherwise")
    if task_rows:
        click.echo(f"rows      {len(task_rows.rows):,} in {task_rows.source}")
        click.echo(f"checksum  {task_rows.checksum}")
    for line in missing:
        click.echo(f"missing   {line}")
    if question:
        _print_question(question, shots)
        if task.kind == "perplexity":
            words, size = question.lengths
            click.echo(f"--- all of it is predicted: {words:,} words, {size:,} bytes ---")


def _roles(task: Task) -> Chat | None:
    """Return a placeholder for the chat template, since there is no model here."""
    from mlx_slim.evaluation.tasks.prompts import Chat

    if not task.spec.chat:
        return None
    return Chat(lambda system, user: f"<system>\n{system}\n<user>\n{user}\n<assistant>")


def _first(question: Question, shots: int) -> JsonObject:
    return {
        "num_fewshot": shots,
        "context": question.context,
        "choices": list(question.readable),
        "target": list(question.targets) if question.others else question.target,
    }


def _print_question(question: Question, shots: int) -> None:
    click.echo(f"\n--- first prompt, {shots} shots ---\n{question.context}")
    if question.choices:
        click.echo("--- continuations (* marks a right one) ---")
        for index, choice in enumerate(question.readable):
            click.echo(f"{'*' if index in question.targets else ' '} {choice!r}")
        if question.contexts:
            click.echo(f"only {question.choices[0]!r} is scored, after each context")
    elif question.target != "":
        heading = "right answers, any counts" if question.others else "right answer"
        click.echo("\n".join([f"--- {heading} ---", *map(str, question.targets)]))


@click.command(epilog="Example: mlx-slim tasks openbookqa")
@click.argument("name", required=False)
@click.option("--data-dir", metavar="DIR", help="Evaluation data (default: MLX_SLIM_DATA).")
@click.option("--num-fewshot", type=Whole(0, MOST_SHOTS), help="Examples in the prompt shown.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(name: str | None, data_dir: str | None, num_fewshot: int | None, as_json: bool) -> None:
    """List the evaluation tasks; show task NAME (or a .yaml file) with its first prompt."""
    if name is None:
        if num_fewshot is not None:
            raise SlimError("--num-fewshot needs the name of a task", "mlx-slim tasks lists them")
        _list(data_dir, as_json)
        return
    from mlx_slim.evaluation.tasks.spec import find_task

    _show(find_task(name), data_dir, num_fewshot, as_json)
    if not as_json:
        show_next(score("MODEL", task=name, out="runs/scores"))
