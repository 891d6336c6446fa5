"""``mlx-slim serve``: an OpenAI-compatible server of one model and its adapters.

Invariant: standard output is empty; address, notes and the access log go to standard error. Ctrl-C
ends it with exit code 130. Try it: ``mlx-slim serve MODEL --adapter runs/mine/adapters``.
"""

from __future__ import annotations

from typing import Any

import click

from mlx_slim.cli.options import options_of
from mlx_slim.serving.options import ServeOptions


def _tell(line: str) -> None:
    click.echo(line, err=True)


def _started(address: str, names: list[str]) -> None:
    _tell(f"serving at {address} until Ctrl-C; models: {', '.join(names)}")


@click.command(epilog="Example: mlx-slim serve models/mine --adapter runs/mine/adapters")
@click.argument("model")
@options_of(ServeOptions)
def command(model: str, **chosen: Any) -> None:
    """Serve MODEL (a folder or a hub id) to clients of OpenAI's API, on this machine.

    A request's model is MODEL, or an adapter as it was given here; nothing else is loaded.
    """
    from mlx_slim.serving.run import serve

    serve(model, ServeOptions(**chosen), tell=_tell, started=_started)
