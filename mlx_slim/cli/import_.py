"""``mlx-slim import``: an adapter of Hugging Face PEFT, for use here and in mlx-lm.

Try it: ``mlx-slim import peft-folder -o adapters --model HuggingFaceTB/SmolLM2-135M-Instruct``.
"""

from __future__ import annotations

from pathlib import Path

import click

from mlx_slim.cli.options import show_next
from mlx_slim.next_steps import use_model


@click.command(
    name="import", epilog="Example: mlx-slim import peft-folder -o adapters --model models/mine"
)
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="New folder.")
@click.option("--model", help="Folder or hub id of the base; default the one the adapter names.")
def command(source: Path, output: Path, model: str | None) -> None:
    """Read SOURCE, a LoRA, rsLoRA or DoRA that PEFT saved, and write an adapter folder."""
    from mlx_slim.console import Console
    from mlx_slim.export.peft import import_peft

    with Console("plain") as console:
        done = import_peft(source, output, base=model, observer=console)
    for line in done.lines():
        click.echo(line)
    show_next(*use_model(model or "MODEL", [output], name=output))
