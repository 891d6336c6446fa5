"""The entry point: the commands, and the format of errors.

Invariant: a command's module is imported only when that command runs; its line in ``--help`` is
here. Every failure is one ``error:`` line and one ``hint:`` line on standard error, without a
traceback (``MLX_SLIM_DEBUG=1`` shows it); that of an internal error is in a file (``crash.py``).
Exit codes: 0 done, 1 internal error, 2 input, 3 memory or disk, 130 interrupted (Ctrl-C, SIGTERM,
SIGHUP). Try it: ``mlx-slim --help``.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import io
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from mlx_slim import __version__, interrupts
from mlx_slim.cli.ranks import check_ranks
from mlx_slim.errors import (
    Complete,
    Interrupted,
    SlimError,
    check_temporary_folder,
    check_working_folder,
    did_you_mean,
    printable,
)

# Pydantic would search all installed packages for plugins, an eighth of a command's start.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

# Heading of --help -> its commands, in the order of use.
GROUPS: dict[str, tuple[str, ...]] = {
    "Start": ("doctor", "demo", "recipes", "tasks"),
    "Inspect": ("data", "plan", "generate", "chat", "serve", "analyze"),
    "Make smaller": ("convert", "quantize", "prune", "slim"),
    "Train": ("train", "distill", "sweep"),
    "Measure": ("eval", "compare", "report", "bench", "worker"),
    "Share": ("fuse", "export", "import", "upload"),
}
COMPLETION = """\b
Tab completion, one line in the start-up file of your shell:
  bash  eval "$(_MLX_SLIM_COMPLETE=bash_source mlx-slim)"                (~/.bashrc)
  zsh   eval "$(_MLX_SLIM_COMPLETE=zsh_source mlx-slim)"                 (~/.zshrc)
  fish  _MLX_SLIM_COMPLETE=fish_source mlx-slim | source  (~/.config/fish/config.fish)"""

# name -> (module in mlx_slim.cli, line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("doctor", "Check this machine: device, memory, speed, hub; how to fix it."),
    "demo": ("demo", "Fine-tune a real model on bundled data, and score before and after."),
    "recipes": ("recipes", "List, show and copy the run configurations."),
    "tasks": ("tasks", "List and show the evaluation tasks."),
    "data": ("data", "Show rows as the model will read them, and find overlaps."),
    "convert": ("convert", "Turn a hub model, an HF folder or a GGUF into an MLX folder."),
    "quantize": ("quantize", "Quantize a model, and measure what it lost."),
    "plan": ("plan", "Predict peak memory, time and disk of a recipe."),
    "train": ("train", "Fine-tune: full, LoRA, QLoRA or DoRA."),
    "eval": ("eval", "Score a model on evaluation tasks."),
    "generate": ("generate", "Complete one prompt."),
    "chat": ("chat", "Chat with a model."),
    "serve": ("serve", "Serve a model and its adapters to clients of OpenAI's API."),
    "fuse": ("fuse", "Merge an adapter into its model, and check what was kept."),
    "export": ("export", "Write an adapter or a model for another toolkit."),
    "import": ("import_", "Read an adapter of another toolkit."),
    "upload": ("upload", "Put a folder on the hub: private, and a dry run by default."),
    "prune": ("prune", "Remove the least important layers, heads or neurons."),
    "slim": ("slim", "Search for the smallest model that keeps its score, and prove it."),
    "distill": ("distill", "Train a small model on the outputs of a larger one."),
    "sweep": ("sweep", "Search the hyperparameters of a recipe, on validation loss."),
    "compare": ("compare", "Run models x methods x tasks as one experiment matrix."),
    "report": ("report", "Write the HTML report of a run, also live, or of an experiment matrix."),
    "analyze": ("analyze", "See what tuning did to the weights, and where memory goes."),
    "bench": ("bench", "Measure speed and memory side by side with mlx-lm."),
    "worker": ("worker", "Run jobs of a Dask cluster on this machine."),
}


def available() -> dict[str, tuple[str, str]]:
    """Return the commands whose module is part of this installation."""
    return {
        name: (module, line)
        for name, (module, line) in COMMANDS.items()
        if importlib.util.find_spec(f"mlx_slim.cli.{module}")
    }


class LazyGroup(click.Group):
    """A group that imports a command's module when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of ``COMMANDS``."""
        return list(available())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command, importing its module; None if there is no such command."""
        if cmd_name not in COMMANDS:
            return None
        name = f"mlx_slim.cli.{COMMANDS[cmd_name][0]}"
        if not importlib.util.find_spec(name):
            return None
        return importlib.import_module(name).command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that ``args`` begins with, or fail with the closest name."""
        name = args[0]
        command = self.get_command(ctx, name)
        if command is None:
            if name.startswith("-"):  # an option of the group itself: click has the message
                return super().resolve_command(ctx, args)
            if ctx.resilient_parsing:  # shell completion of an unknown command: nothing
                return None, None, []
            raise SlimError(f"no command {name!r}", did_you_mean(name, available()))
        return name, command, args[1:]

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the completions after ``mlx-slim``, without importing any command."""
        names = [
            CompletionItem(name, help=line)
            for name, (_, line) in available().items()
            if name.startswith(incomplete)
        ]
        return [*names, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing any."""
        commands = available()
        width = max(map(len, commands), default=0)
        for title, names in GROUPS.items():
            if rows := [
                (name.ljust(width), commands[name][1]) for name in names if name in commands
            ]:
                with formatter.section(title):
                    formatter.write_dl(rows)


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    epilog=COMPLETION,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="mlx-slim")
@click.pass_context
def command(ctx: click.Context) -> None:
    """Make a language model smaller and better at your task, and know what it cost.

    Example: mlx-slim demo, then mlx-slim train smollm2-lora data.path=your-rows.jsonl -o runs/mine
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
    else:
        check_ranks(ctx.invoked_subcommand)
        check_working_folder()
        check_temporary_folder()


def _fail(message: str, hint: str, code: int, details: Sequence[str] = ()) -> int:
    """Print the two lines of a failure, and its details between them; return the exit code."""
    lines = [f"error: {message}", *(f"  {line}" for line in details)]
    lines += [f"hint: {hint}"] if hint else []
    try:
        for line in lines:
            indent = "  " * line.startswith("  ")
            click.echo(indent + printable(" ".join(line.split())), err=True)
    except OSError:  # standard error is closed
        _silence(sys.stderr)
    return code


def _usage_hint(error: click.UsageError) -> str:
    """Return the hint of a usage error: the closest option, else the help command."""
    if isinstance(error, click.NoSuchOption) and error.possibilities:
        return f"did you mean {error.possibilities[0]!r}?"
    path = error.ctx.command_path if error.ctx else "mlx-slim"
    return f"see {path} --help"


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; return its exit code.

    Args:
        arguments: The words after the program's name; the process's own by default.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    streams = sys.stdout, sys.stderr
    with interrupts.raise_on_signal():
        try:
            result: Any = command.main(args=words, prog_name="mlx-slim", standalone_mode=False)
            if sys.stdout is not None:
                sys.stdout.flush()
        except (KeyboardInterrupt, click.Abort) as stop:
            return _lost_rank(stop) or _fail("interrupted", "", Interrupted.exit_code)
        except SystemExit as leaving:  # of rich, or of click, which wraps the streams before
            if sys.stdout is streams[0] and not isinstance(leaving.__context__, BrokenPipeError):
                raise
            sys.stdout, sys.stderr = streams
            return _ended(BrokenPipeError(), words)
        except Exception as error:
            return _ended(error, words)
        return result if isinstance(result, int) else 0


def _ended(error: Exception, words: list[str]) -> int:
    """Report the error that ended a command; return the exit code."""
    debugging = os.environ.get("MLX_SLIM_DEBUG", "0") not in ("", "0")
    if isinstance(error, Complete):
        record = {"schema_version": 1, "status": "complete", "path": str(error.path)}
        click.echo(json.dumps(record) if "--json" in words else error.message)
        return 0
    if isinstance(error, click.NoSuchOption):
        return _fail(f"no option {error.option_name!r}", _usage_hint(error), 2)
    if isinstance(error, click.UsageError):
        if type(error).__name__ == "NoArgsIsHelpError":  # click 8.2: a group without a command
            click.echo(error.format_message())
            return 0
        return _fail(error.format_message(), _usage_hint(error), 2)
    if isinstance(error, click.ClickException):
        return _fail(error.format_message(), "", 2)
    if isinstance(error, BrokenPipeError):  # the reader closed the pipe: ``| head``
        _silence(sys.stdout)
        return 0
    if code := _lost_rank(error):
        return code
    if debugging:
        raise error
    if not isinstance(error, SlimError):
        from mlx_slim.cli.crash import explained

        error = explained(error, words)
    return _fail(error.message, error.hint, error.exit_code, error.details)


def _lost_rank(error: BaseException) -> int:
    """Print which other rank is lost, if that is why this one ends; return the exit code, or 0."""
    ranks = sys.modules.get("mlx_slim.ranks.watch")
    if ranks is None or not ranks.watching():
        return 0
    if isinstance(error, (KeyboardInterrupt, Interrupted)) and (line := ranks.missing_rank()):
        return _fail(line, "", 1)
    if (lost := ranks.lost_peer(error)) is not None:
        return _fail(f"{lost.message}; {lost.hint}", "", lost.exit_code)
    return 0


def _silence(stream: Any) -> None:
    """Redirect a stream to the null device: its buffer must not fail again at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _prepare_streams() -> None:
    """Make encoding errors of the standard streams harmless.

    An undecodable byte of standard input becomes a surrogate, which is refused where text is read.
    """
    for name, instead in (
        ("stdin", "surrogateescape"),
        ("stdout", "backslashreplace"),
        ("stderr", "backslashreplace"),
    ):
        stream = getattr(sys, name)
        if stream is None:  # closed by the parent: its descriptor must not be reused by a file
            setattr(sys, name, Path(os.devnull).open("r+", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors=instead)


def main() -> NoReturn:
    """Run the process's command line and exit with its code."""
    _prepare_streams()
    interrupts.end_with_parent()
    try:
        code = run()
    except KeyboardInterrupt:  # while the error was printed
        code = Interrupted.exit_code
    gc.freeze()  # the exit would look through all objects for cycles: a thirtieth of a plan
    if (ranks := sys.modules.get("mlx_slim.ranks.watch")) is not None:
        ranks.leave(code)
    for (
        number
    ) in interrupts.SIGNALS:  # nothing is left to clean up: the default action may end the process
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    sys.exit(code)


if __name__ == "__main__":
    main()
