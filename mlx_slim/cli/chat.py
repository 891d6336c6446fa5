"""``mlx-slim chat``: an interactive conversation with a model.

Invariant: the whole conversation is the prompt of every turn, computed only where it is new; Ctrl-C
ends the answer, not the conversation. Try it: ``mlx-slim chat MODEL --adapter run/adapters``.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import click

from mlx_slim.cli.options import options_of, show_next
from mlx_slim.cli.speaker import open_and_tell
from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.evaluation.options import ChatOptions
from mlx_slim.interrupts import Terminated
from mlx_slim.next_steps import train_on, use_model

if TYPE_CHECKING:
    from mlx_slim.evaluation.chat import ChatSession

_COMMANDS = {
    "/reset": "start a new conversation",
    "/adapter": "switch adapters: /adapter DIR[=WEIGHT] ..., or /adapter none",
    "/exit": "leave (also Ctrl-D)",
}


def _switch(speaker: ChatSession, names: list[str]) -> None:
    """Load other adapters; if they do not fit, report it and use the model without adapters."""
    try:
        speaker.use(None if names in ([], ["none"]) else names)
    except SlimError as error:
        click.echo(f"error: {error}; continuing without an adapter", err=True)
        return
    click.echo(f"adapter: {' '.join(names) or 'none'}; the conversation continues", err=True)


@click.command(epilog="Example: mlx-slim chat models/mine --adapter runs/mine/adapters")
@click.argument("model")
@options_of(ChatOptions)
def command(model: str, **chosen: Any) -> None:
    """Chat with MODEL (a folder or a hub id).

    /reset starts a new conversation, /adapter switches adapters, /exit or Ctrl-D leaves.
    """
    import mlx.core as mx

    from mlx_slim.evaluation.following import leading

    options = ChatOptions(**chosen)
    speaker = open_and_tell(model, options)
    mx.random.seed(options.seed)
    with leading(speaker) as leads:
        if leads:
            _converse(model, speaker, options)


def _converse(model: str, speaker: ChatSession, options: ChatOptions) -> None:
    """Read turns and print answers until the end of the input."""
    start = [{"role": "system", "content": options.system}] if options.system else []
    speaker.chat_ids([*start, {"role": "user", "content": "hello"}])  # refuse before the first turn
    messages = list(start)
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # line editing and recall, where Python has it
            import readline  # noqa: F401
        click.echo("; ".join(f"{name}: {what}" for name, what in _COMMANDS.items()), err=True)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            break
        if not line:
            continue
        if line.startswith("/"):
            if line == "/exit":
                break
            if line == "/reset":
                messages = list(start)
                click.echo("new conversation", err=True)
            elif line.split()[0] == "/adapter":
                _switch(speaker, line.split()[1:])
            else:
                click.echo(f"no command {line!r}: {did_you_mean(line, _COMMANDS)}", err=True)
            continue
        messages.append({"role": "user", "content": line})
        pieces: list[str] = []
        try:
            ids = speaker.chat_ids(messages)
            for piece in speaker.stream(
                ids, max_tokens=options.max_tokens, temperature=options.temp
            ):
                pieces.append(piece)
                click.echo(piece, nl=False)
        except Terminated:
            raise
        except KeyboardInterrupt:
            click.echo(" …", nl=False)
        except SlimError as error:  # of this turn only: the conversation continues without it
            click.echo(f"error: {error}", err=True)
            messages.pop()
            continue
        click.echo()
        if (reply := speaker.timed_without_draft()) and reply.draft is not None:
            click.echo(str(reply.draft), err=True)
        messages.append({"role": "assistant", "content": "".join(pieces)})
    if interactive:
        show_next(*use_model(model, options.adapter)[1:], train_on(model))
