"""The help: groups by what people want, a verb and an example each; what a shell completes."""

from __future__ import annotations

from typing import Any

import click
import pytest

from mlx_slim.cli import main as entry
from tests.cli.test_main import slim
from tests.support.imports import imported_by


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the words of every command below ``command``, groups included."""
    if not isinstance(command, click.Group):
        return [path]
    context = click.Context(command)
    below = [(name, command.get_command(context, name)) for name in command.list_commands(context)]
    return [path, *(leaf for name, one in below if one for leaf in leaves(one, (*path, name)))]


COMMANDS = [path for path in leaves(entry.command) if path]
VERBS = [
    "Chat",
    "Check",
    "Compare",
    "Complete",
    "Convert",
    "Count",
    "Fine-tune",
    "List",
    "Look",
    "Measure",
    "Merge",
    "Predict",
    "Prune",
    "Quantize",
    "Search",
    "Read",
    "Run",
    "Score",
    "See",
    "Serve",
    "Show",
    "Train",
    "Upload",
    "Write",
]


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_the_help_of_a_command_has_a_verb_and_an_example(
    path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.run([*path, "--help"]) == 0
    _, text = capsys.readouterr().out.split("\n\n", 1)
    assert text.split()[0] in VERBS
    example = " ".join(text.split("Example: ", 1)[1].split())
    assert example.startswith(f"mlx-slim {' '.join(path)}")


def test_every_command_stands_in_one_group_by_what_people_want(
    capsys: pytest.CaptureFixture[str],
) -> None:
    grouped = [name for names in entry.GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(entry.COMMANDS)
    assert entry.run(["--help"]) == 0
    text = capsys.readouterr().out
    places = [text.index(f"\n{title}:\n") for title in entry.GROUPS]
    assert places == sorted(places)
    for name in entry.available():
        assert f"\n  {name} " in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_help_says_how_a_shell_completes_and_it_does(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    entry.run(["--help"])
    assert f"_MLX_SLIM_COMPLETE={shell}_source mlx-slim" in capsys.readouterr().out
    source = slim(_MLX_SLIM_COMPLETE=f"{shell}_source")
    assert source.returncode == 0 and "_MLX_SLIM_COMPLETE" in source.stdout


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("mlx-slim ", set(entry.available())),
        ("mlx-slim qu", {"quantize"}),
        ("mlx-slim train smollm2-q", {"smollm2-qat", "smollm2-qlora"}),
        ("mlx-slim train --dry", {"--dry-run"}),
        ("mlx-slim nonsense ", set(entry.available())),
    ],
)
def test_what_a_shell_is_offered(typed: str, offered: Any) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split(" ")) - 1)}
    done = slim(_MLX_SLIM_COMPLETE="bash_complete", **words)
    assert {line.partition(",")[2] for line in done.stdout.splitlines()} == offered
    assert done.stderr == ""


def test_a_shell_that_completes_waits_for_no_heavy_import() -> None:
    out, heavy = imported_by(
        "import os; from mlx_slim.cli import main\n"
        "os.environ.update(_MLX_SLIM_COMPLETE='bash_complete', COMP_WORDS='mlx-slim ', "
        "COMP_CWORD='1')\n"
        "try: main.run([])\n"
        "except SystemExit: pass"
    )
    assert "doctor" in out and heavy == "set()\n"
