"""``mlx-slim fuse``: merge an adapter into its model, with an audit of the result.

Try it: ``mlx-slim fuse MODEL --adapter runs/mine/adapters -o fused``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mlx_slim.cli.options import options_of, show_next
from mlx_slim.export.options import FuseOptions
from mlx_slim.next_steps import use_model


@click.command(
    name="fuse",
    epilog="Example: mlx-slim fuse models/mine --adapter runs/mine/adapters -o models/fused",
)
@click.argument("model")
@click.option(
    "--adapter",
    required=True,
    multiple=True,
    metavar="DIR[=WEIGHT]",
    help="Adapter or run folder; several are summed with their weights.",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="New folder.")
@click.option(
    "--keep", "mode", flag_value="keep", help="Do not merge: base and adapter in one folder."
)
@click.option("--dequantize", "mode", flag_value="dequantize", help="Write an unquantized model.")
@click.option(
    "--requantize", "mode", flag_value="requantize", help="Quantize each layer again as it was."
)
@options_of(FuseOptions, "dtype", "force", "calibration", "samples", "length", "revision")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def command(
    model: str,
    adapter: tuple[str, ...],
    output: Path,
    mode: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Merge an adapter into MODEL (a folder or hub id) and write a new folder.

    With several adapters, their weighted sum is merged. A dense base is merged. An adapter trained
    with adapter.pooled=true goes into the biases of its quantized base, which stays quantized; with
    another one the model becomes dense unless --requantize (refused where rounding would undo the
    tuning) or --keep.
    """
    from rich.console import Console as RichConsole

    from mlx_slim.console import Console
    from mlx_slim.export.fuse import fuse

    options = FuseOptions(**({"mode": mode} if mode else {}), **settings)
    notices = RichConsole(highlight=False, stderr=as_json)
    with Console("quiet" if as_json else "plain", output=notices) as console:
        result = fuse(model, adapter, output, options, console)
    for line in [json.dumps(result.as_record())] if as_json else result.lines():
        click.echo(line)
    if not as_json:
        show_next(*use_model(output))
