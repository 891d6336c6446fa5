"""The entry point: lazy commands, one-line failures, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from mlx_slim import __version__
from mlx_slim.cli import main as entry
from mlx_slim.errors import ResourceError, SlimError

ROOT = Path(__file__).parents[2]


def slim(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "mlx_slim", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes ``mlx-slim doctor`` do what it is given."""

    def install(body):
        @click.command()
        @click.option("--rounds", type=int)
        def fake(rounds):
            body()

        monkeypatch.setattr(entry.LazyGroup, "get_command", lambda self, ctx, name: fake)

    return install


def raising(error: BaseException):
    def body():
        raise error

    return body


def test_help_lists_the_commands_and_imports_nothing_heavy():
    code = (
        "import sys; from mlx_slim.cli.main import run; run(['--help']);"
        "heavy = {'mlx.core', 'mlx_lm', 'transformers', 'datasets', 'rich', 'numpy'};"
        "print(heavy & set(sys.modules), file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "doctor" in result.stdout
    assert result.stderr == "set()\n"


@pytest.mark.parametrize("name", list(entry.available()))
def test_every_command_loads_and_explains_itself(name: str, capsys):
    assert entry.run([name, "--help"]) == 0
    assert "Usage: mlx-slim" in capsys.readouterr().out


def test_a_module_that_is_absent_is_no_command(monkeypatch, capsys):
    monkeypatch.setitem(entry.COMMANDS, "fly", ("no_such_module", "Fly."))
    assert "fly" not in entry.available()
    assert entry.run(["fly"]) == 2
    assert "no command 'fly'" in capsys.readouterr().err


def test_version_and_bare_call(capsys):
    assert entry.run(["--version"]) == 0
    assert __version__ in capsys.readouterr().out
    assert entry.run([]) == 0
    assert "Commands:" in capsys.readouterr().out


def test_a_mistyped_command_and_option_are_met_with_the_closest(capsys):
    assert entry.run(["docter"]) == 2
    assert capsys.readouterr().err == ("error: no command 'docter'\nhint: did you mean 'doctor'?\n")
    assert entry.run(["doctor", "--jsno"]) == 2
    assert capsys.readouterr().err == ("error: no option '--jsno'\nhint: did you mean '--json'?\n")
    assert entry.run(["doctor", "extra"]) == 2
    assert "hint: see mlx-slim doctor --help" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (SlimError("rank is 0, expected 1 or more", "set adapter.rank=8"), 2, "set adapter.rank"),
        (ResourceError("needs 9 GB, has 8 GB"), 3, "needs 9 GB"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.FileError("x.yaml", "no such file"), 2, "x.yaml"),
    ],
)
def test_failures_are_one_line_and_a_code(error, code, text, command, capsys):
    command(raising(error))
    assert entry.run(["doctor"]) == code
    captured = capsys.readouterr()
    assert text in captured.err
    assert captured.err.count("error: ") == 1
    assert captured.out == ""


def test_a_message_with_line_breaks_is_still_one_line(command, capsys):
    command(raising(SlimError("two\nlines", "a\nhint")))
    entry.run(["doctor"])
    assert capsys.readouterr().err == "error: two lines\nhint: a hint\n"


def test_our_own_mistakes_keep_their_traceback(command):
    command(raising(ZeroDivisionError("bug")))
    with pytest.raises(ZeroDivisionError):
        entry.run(["doctor"])


def test_debugging_shows_the_traceback_of_a_users_mistake(command, monkeypatch):
    monkeypatch.setenv("MLX_SLIM_DEBUG", "1")
    command(raising(SlimError("seen")))
    with pytest.raises(SlimError):
        entry.run(["doctor"])


def test_a_reader_that_leaves_is_no_error():
    result = subprocess.run(
        f"{sys.executable} -m mlx_slim --help | true",
        shell=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.stderr == ""


def test_the_process_gives_the_exit_code():
    result = slim("docter")
    assert (result.returncode, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    assert slim("--version").stdout.strip().endswith(__version__)
