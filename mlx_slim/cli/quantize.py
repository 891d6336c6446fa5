"""``mlx-slim quantize``: a smaller model, and what it lost."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mlx_slim.cli.options import Whole

_METHODS = "rtn, awq, gptq, dwq or dynamic"
_RECIPES = "mixed_2_6, mixed_3_4, mixed_3_6 or mixed_4_6"


@click.command(name="quantize")
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="New folder.")
@click.option(
    "--bits", type=Whole(2, 8), default=None, help="2, 3, 4, 5, 6 or 8; default 4 (mxfp8: 8)."
)
@click.option("--group-size", type=Whole(16, 128), default=None, help="32, 64 or 128; default 64.")
@click.option("--mode", default="affine", show_default=True, help="affine, mxfp4, mxfp8 or nvfp4.")
@click.option("--method", default="rtn", show_default=True, help=f"{_METHODS}.")
@click.option("--recipe", default=None, help=f"Mixed precision of method rtn: {_RECIPES}.")
@click.option("--calibration", default=None, help="Text file or data set; default Alpaca.")
@click.option(
    "--calibration-samples",
    type=Whole(1),
    default=32,
    show_default=True,
    help="Rows that awq, gptq, dwq and dynamic look at.",
)
@click.option(
    "--calibration-length",
    type=Whole(8),
    default=256,
    show_default=True,
    help="Tokens of a row.",
)
@click.option(
    "--fidelity-samples",
    type=Whole(0),
    default=4,
    show_default=True,
    help="Held-out rows that the result is compared with its source on; 0: not at all.",
)
@click.option("--revision", default=None, help="Commit or tag of a hub model.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def command(
    model: str,
    output: Path,
    bits: int | None,
    group_size: int | None,
    mode: str,
    method: str,
    recipe: str | None,
    calibration: str | None,
    calibration_samples: int,
    calibration_length: int,
    fidelity_samples: int,
    revision: str | None,
    as_json: bool,
) -> None:
    """Quantize MODEL (a folder or hub id) into a new MLX folder.

    Prints bits per weight, sizes, the layers left out and why, and how far the result is from its
    source: mean KL and how often both find the same next token likeliest.
    """
    from rich.console import Console as RichConsole

    from mlx_slim.console import Console
    from mlx_slim.quantization.policy import quantize_config
    from mlx_slim.quantization.run import CompressOptions, compress

    options = CompressOptions(
        quantize=quantize_config(bits, group_size, mode),
        method=method,
        recipe=recipe,
        calibration=calibration,
        samples=calibration_samples,
        length=calibration_length,
        fidelity_samples=fidelity_samples,
        revision=revision,
    )
    output_of_notices = RichConsole(highlight=False, stderr=as_json)
    with Console("quiet" if as_json else "plain", output=output_of_notices) as console:
        result = compress(model, output, options, console)
    if as_json:
        click.echo(json.dumps(result.as_record()))
        return
    for line in result.lines():
        click.echo(line)
