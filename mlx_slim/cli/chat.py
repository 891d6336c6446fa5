"""``mlx-slim chat``: talk with a model, turn by turn.

Invariant: the whole conversation is the prompt of every turn, computed only where it is new; Ctrl-C
stops an answer and not the conversation. Try it: ``mlx-slim chat MODEL --adapter run/adapters``.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

import click

from mlx_slim.cli.options import show_next, speaker_options
from mlx_slim.cli.speaker import open_and_tell
from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.interrupts import Terminated
from mlx_slim.next_steps import train_on, use_model

if TYPE_CHECKING:
    from mlx_slim.evaluation.chat import ChatSession

_COMMANDS = {
    "/reset": "forget the conversation",
    "/adapter": "switch adapters: /adapter DIR[=WEIGHT] ..., or /adapter none",
    "/exit": "leave (also Ctrl-D)",
}


def _switch(speaker: ChatSession, names: list[str]) -> None:
    """Put other adapters on; where they do not fit, say so: the model answers alone then."""
    try:
        speaker.use(None if names in ([], ["none"]) else names)
    except SlimError as error:
        click.echo(f"error: {error}; no adapter now", err=True)
        return
    click.echo(f"adapter: {' '.join(names) or 'none'}; the conversation goes on", err=True)


@click.command(epilog="Example: mlx-slim chat models/mine --adapter runs/mine/adapters")
@speaker_options(max_tokens=512, temp=0.7)
def command(
    model: str,
    adapter: tuple[str, ...],
    system: str | None,
    max_tokens: int,
    temp: float,
    seed: int,
    revision: str | None,
    trust_remote_code: bool,
) -> None:
    """Talk with MODEL (a folder or a hub id).

    /reset forgets, /adapter switches adapters, /exit or Ctrl-D leaves.
    """
    import mlx.core as mx

    speaker = open_and_tell(model, adapter, revision, trust_remote_code)
    mx.random.seed(seed)
    start = [{"role": "system", "content": system}] if system else []
    speaker.chat_ids([*start, {"role": "user", "content": "hello"}])  # refuse before the first turn
    messages = list(start)
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # line editing and recall, where Python has it
            import readline  # noqa: F401
        click.echo("; ".join(f"{name}: {what}" for name, what in _COMMANDS.items()), err=True)
    while True:
        try:
            said = input("> " if interactive else "").strip()
        except EOFError:
            break
        if not said:
            continue
        if said.startswith("/"):
            if said == "/exit":
                break
            if said == "/reset":
                messages = list(start)
                click.echo("forgotten", err=True)
            elif said.split()[0] == "/adapter":
                _switch(speaker, said.split()[1:])
            else:
                click.echo(f"no command {said!r}: {did_you_mean(said, _COMMANDS)}", err=True)
            continue
        messages.append({"role": "user", "content": said})
        pieces: list[str] = []
        try:
            ids = speaker.chat_ids(messages)
            for piece in speaker.stream(ids, max_tokens=max_tokens, temperature=temp):
                pieces.append(piece)
                click.echo(piece, nl=False)
        except Terminated:
            raise
        except KeyboardInterrupt:
            click.echo(" …", nl=False)
        except SlimError as error:  # of this turn only: the conversation goes on without it
            click.echo(f"error: {error}", err=True)
            messages.pop()
            continue
        click.echo()
        messages.append({"role": "assistant", "content": "".join(pieces)})
    if interactive:
        show_next(*use_model(model, adapter)[1:], train_on(model))
