"""What one would type next: real paths, quoted for a shell, of options that exist."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest

from mlx_slim.artifacts import write_json
from mlx_slim.cli.main import command
from mlx_slim.cli.options import show_next
from mlx_slim.evaluation.tasks.examples import task_to_score
from mlx_slim.finetuning.demo import data_files
from mlx_slim.next_steps import (
    GENERAL_TASK,
    YOUR_TASK,
    NextStep,
    after_run,
    look_at,
    score,
    step,
    train_on,
    use_model,
)


def parsed(words: list[str]) -> click.Context:
    """Parse a command line as the program does, without running it."""
    context = click.Context(command)
    name, subcommand, rest = command.resolve_command(context, words)
    assert subcommand is not None
    return subcommand.make_context(name, rest, parent=context)


def run_folder(path: Path, artifact: str) -> Path:
    if artifact == "adapters":
        write_json(path / artifact / "adapter_config.json", {})
    return path


@pytest.mark.parametrize("artifact", ["adapters", "model"])
@pytest.mark.parametrize("base", [None, "base"])
def test_every_step_is_a_command_that_parses(
    tmp_path: Path, artifact: str, base: str | None
) -> None:
    out = run_folder(tmp_path / "my run's", artifact)
    steps = [
        *after_run(out, "train", "smollm2-lora", "owner/name", artifact, ["below"], base),
        *use_model("owner/name", ["a=0.7", "b=0.3"]),
        train_on(out),
        score("owner/name", out="scores"),
    ]
    for one in steps:
        words = shlex.split(one.command)
        if words[0] == "mlx-slim":
            parsed(words[1:])
        else:
            assert one == look_at(out / "report.html")


def test_paths_are_real_and_quoted(tmp_path: Path) -> None:
    out = run_folder(tmp_path / "my run", "adapters")
    commands = [one.command for one in after_run(out, "train", "r", "m", "adapters")]
    assert any(f"--adapter '{out / 'adapters'}'" in line for line in commands)
    assert all(shlex.join(shlex.split(line)) == line for line in commands)
    qlora = after_run(out, "train", "r", "m", "adapters", (), "base")
    assert any(f"chat '{out / 'base'}'" in one.command for one in qlora)


@pytest.mark.parametrize(
    ("rows", "task"),
    [
        (["mine.jsonl"], YOUR_TASK),
        (["tatsu-lab/alpaca", "tickets.csv"], YOUR_TASK),
        (["task:arc_easy", "task:hellaswag"], "arc_easy,hellaswag"),
        ([str(data_files()[0])], "demo_exact_match"),
        (["tatsu-lab/alpaca"], GENERAL_TASK),
    ],
)
def test_a_run_is_scored_on_a_task_that_concerns_its_rows(
    tmp_path: Path, rows: list[str], task: str
) -> None:
    assert task_to_score(rows) == task
    out = run_folder(tmp_path / "run", "adapters")
    steps = after_run(out, "train", "r", "owner/name", "adapters", task=task_to_score(rows))
    scoring = [shlex.split(one.command) for one in steps if " eval " in one.command]
    assert [words[words.index("--task") + 1] for words in scoring] == [task]


def test_own_rows_in_a_folder_are_scored_on_a_task_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    assert task_to_score([str(tmp_path / "rows")]) == YOUR_TASK


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize("name", ["a\nb", "it's\t\\1", "\x1b[2Jgone", "é\n", os.fsdecode(b"\xff")])
def test_what_a_terminal_would_obey_is_escaped_for_the_shell(name: str) -> None:
    command = step("", "printf", "%s", name).command
    assert command.isprintable()
    printed = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
    assert os.fsdecode(printed.stdout) == name


def test_a_new_folder_of_a_hub_model_is_named_by_its_last_part() -> None:
    lines = [one.command for one in use_model("owner/name")]
    assert lines[-1] == "mlx-slim export owner/name --to ollama -o name-ollama"


def test_the_block_is_short_aligned_and_on_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show_next(step("talk", "mlx-slim", "chat", "a b"), NextStep("merge it", "mlx-slim fuse"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "next:\n  talk      mlx-slim chat 'a b'\n  merge it  mlx-slim fuse\n"
