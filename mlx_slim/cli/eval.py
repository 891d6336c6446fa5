"""``mlx-slim eval``: score models on tasks and texts, and compare two results.

Invariant: user errors are reported before any weight is read. Try it:
``mlx-slim eval MODEL --task openbookqa,arc_easy --limit 100 -o OUT``, then
``mlx-slim eval --compare OUT OUT_2``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from mlx_slim.cli.options import alive, options_of, output_mode, rank_timeout, show_next
from mlx_slim.cli.ranks import check_ranks
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.options import EvalOptions
from mlx_slim.next_steps import step
from mlx_slim.progress import stage

_FOLDER = click.Path(path_type=Path)


@click.command(
    "eval", epilog="Example: mlx-slim eval models/mine --task openbookqa --limit 100 -o runs/scores"
)
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@options_of(EvalOptions, "adapter")
@click.option("--task", "tasks", multiple=True, metavar="NAMES", help="Tasks, suites, task files.")
@options_of(
    EvalOptions,
    "perplexity",
    "limit",
    "num_fewshot",
    "data_dir",
    "apply_chat_template",
    "fewshot_as_multiturn",
    "system",
    "dtype",
    "max_length",
    "batch_tokens",
    "kv_bits",
    "seed",
    "revision",
    "trust_remote_code",
    "parallel",
)
@click.option(
    "--compare", type=_FOLDER, nargs=2, metavar="OUT_A OUT_B", help="Compare two results."
)
@click.option("-o", "--out", type=_FOLDER, help="New folder for the results.")
@click.option("--resume", is_flag=True, help="Resume the evaluation in OUT.")
@rank_timeout
@output_mode("Events and results as JSON lines.", "Warnings and the table only.")
def command(
    models: tuple[str, ...],
    tasks: tuple[str, ...],
    compare: tuple[Path, Path] | None,
    out: Path | None,
    resume: bool,
    mode: Any,
    seed: int,
    **options: Any,
) -> None:
    """Score MODEL (a folder or a hub id; several get a folder each inside OUT) on tasks.

    mlx-slim tasks lists the tasks. OUT gets results.json and, question by question,
    samples_TASK.jsonl; a stopped evaluation resumes with --resume.
    """
    options["adapter"] = options["adapter"] or None
    if not options["fewshot_as_multiturn"] and not options["apply_chat_template"]:
        raise SlimError(
            "--no-fewshot-as-multiturn needs a chat template",
            "add --apply-chat-template, or leave it out",
        )
    if compare:
        check_ranks("eval --compare")
        _compare(compare, models, tasks, out, seed, mode == "json", {**options, "resume": resume})
        return
    if out is None:
        raise click.UsageError("-o OUT is missing: the folder for the results")
    from mlx_slim import runtime
    from mlx_slim.console import Console
    from mlx_slim.console.scoring import Scoring
    from mlx_slim.evaluation.run import evaluate, result_folders

    with Console(mode, display=Scoring()) as console:
        results = evaluate(
            models,
            tasks,
            out,
            EvalOptions(seed=seed, **options),
            resume=resume,
            observer=console,
        )
    if runtime.world().rank() != 0:
        return
    if mode == "json":
        click.echo(json.dumps({"event": "results", "results": results}))
        return
    from mlx_slim.console.tables import show_results

    folders = result_folders(models, out)
    show_results(results, folders)
    other = folders[1] if len(folders) > 1 else "OTHER_SCORES"
    show_next(
        step("compare it with another", "mlx-slim", "eval", "--compare", folders[0], other),
        step("read its answers", "less", *sorted(folders[0].glob("samples_*.jsonl"))[:1]),
    )


def _compare(
    outs: tuple[Path, Path],
    models: tuple[str, ...],
    tasks: tuple[str, ...],
    out: Path | None,
    seed: int,
    as_json: bool,
    options: Mapping[str, Any],
) -> None:
    """Compare two folders; write ``comparison.json`` if ``-o`` is given."""
    defaults = {field.name: field.default for field in fields(EvalOptions)}
    unused = [k for k, value in options.items() if value and value != defaults.get(k)]
    unused += ["MODEL"] if models else []
    unused += ["task"] if tasks else []
    if unused:
        raise SlimError(
            f"--compare takes two output folders and no scoring option: {', '.join(unused)}",
            "mlx-slim eval --compare OUT_A OUT_B [-o DIR]",
        )
    from mlx_slim.artifacts import check_writable, write_json
    from mlx_slim.evaluation.comparison import compare

    target = None if out is None else out / "comparison.json"
    if target is not None:
        if target.exists():
            raise SlimError(f"{target} exists already", "choose another output folder")
        check_writable(target.parent)
    with alive(), stage("resampling both results"):
        comparison = compare(outs[0], outs[1], seed=seed)
    if target is not None:
        write_json(target, comparison.as_record(), replace=False)
    if as_json:
        click.echo(json.dumps(comparison.as_record()))
        return
    from mlx_slim.console.tables import show_comparison

    show_comparison(comparison)
    if target is not None:
        click.echo(f"written: {target}")
    show_next(step("read the answers", "less", *sorted(outs[1].glob("samples_*.jsonl"))[:1]))
