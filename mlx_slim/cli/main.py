"""The entry point: which commands exist, and how a failure looks.

Invariant: a command's module is imported only when that command runs; its line in ``--help`` stands
here. The user's mistakes are one ``error:`` line and one ``hint:`` line on standard error, without
a traceback (``MLX_SLIM_DEBUG=1`` shows it); our own mistakes keep theirs. Exit codes: 0 done, 2
input, 3 memory or disk, 130 interrupted. Try it: ``mlx-slim --help``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from mlx_slim import __version__
from mlx_slim.errors import Complete, SlimError, did_you_mean

# name -> (module in mlx_slim.cli, line of help), in the order that a user meets them
COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("doctor", "Check this machine: device, memory, speed, hub; how to mend it."),
    "demo": ("demo", "Fine-tune a real model on bundled data, and score before and after."),
    "recipes": ("recipes", "List, show and copy the run configurations."),
    "tasks": ("tasks", "List and show the evaluation tasks."),
    "data": ("data", "Look at data as the training loop will see it."),
    "convert": ("convert", "Turn a hub model, an HF folder or a GGUF into an MLX folder."),
    "quantize": ("quantize", "Make a model smaller, and say what it lost."),
    "plan": ("plan", "Predict peak memory, time and disk of a recipe."),
    "train": ("train", "Fine-tune: full, LoRA, QLoRA or DoRA."),
    "eval": ("eval", "Score a model on evaluation tasks."),
    "generate": ("generate", "Complete one prompt."),
    "chat": ("chat", "Talk with a model."),
    "fuse": ("fuse", "Merge an adapter into its model, with an audit."),
    "export": ("export", "Write an adapter or a model for another toolkit."),
    "import": ("import_", "Read an adapter of another toolkit."),
    "upload": ("upload", "Put a folder on the hub: private, and a dry run by default."),
    "prune": ("prune", "Remove layers or widths that matter least."),
    "distill": ("distill", "Train a small model on what a large one says."),
    "compare": ("compare", "Run a matrix of experiments."),
    "report": ("report", "Write the report of an experiment matrix."),
    "analyze": ("analyze", "See what tuning did to the weights, and where memory goes."),
    "bench": ("bench", "Measure speed and memory side by side with mlx-lm."),
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
            raise SlimError(f"no command {name!r}", did_you_mean(name, available()))
        return name, command, args[1:]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing any."""
        if rows := [(name, line) for name, (_, line) in available().items()]:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="mlx-slim")
@click.pass_context
def command(ctx: click.Context) -> None:
    """Make a language model smaller and better at your task, and know what it cost."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def _fail(message: str, hint: str, code: int, details: Sequence[str] = ()) -> int:
    """Print the two lines of a failure, and its details between them; return the exit code."""
    click.echo(f"error: {' '.join(message.split())}", err=True)
    for line in details:
        click.echo(f"  {' '.join(line.split())}", err=True)
    if hint:
        click.echo(f"hint: {' '.join(hint.split())}", err=True)
    return code


def _usage_hint(error: click.UsageError) -> str:
    """Return the way out of a usage error: the closest option, else where the help stands."""
    if isinstance(error, click.NoSuchOption) and error.possibilities:
        return f"did you mean {error.possibilities[0]!r}?"
    path = error.ctx.command_path if error.ctx else "mlx-slim"
    return f"see {path} --help"


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; return its exit code.

    Args:
        arguments: The words after the program's name; the process's own by default.
    """
    try:
        result: Any = command.main(
            args=None if arguments is None else list(arguments),
            prog_name="mlx-slim",
            standalone_mode=False,
        )
        sys.stdout.flush()
    except Complete as done:
        words = sys.argv[1:] if arguments is None else arguments
        record = {"schema_version": 1, "status": "complete", "path": str(done.path)}
        click.echo(json.dumps(record) if "--json" in words else done.message)
        return 0
    except SlimError as error:
        if os.environ.get("MLX_SLIM_DEBUG", "0") not in ("", "0"):
            raise
        return _fail(error.message, error.hint, error.exit_code, error.details)
    except click.NoSuchOption as error:
        return _fail(f"no option {error.option_name!r}", _usage_hint(error), 2)
    except click.UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # click 8.2: a group without a command
            click.echo(error.format_message())
            return 0
        return _fail(error.format_message(), _usage_hint(error), 2)
    except click.ClickException as error:
        return _fail(error.format_message(), "", 2)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", "", 130)
    except BrokenPipeError:
        # The reader left (``| head``). What is still buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return result if isinstance(result, int) else 0


def main() -> NoReturn:
    """Run the process's command line and exit with its code."""
    sys.exit(run())


if __name__ == "__main__":
    main()
