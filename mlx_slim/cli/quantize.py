"""``mlx-slim quantize``: a smaller model, and its fidelity to the source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mlx_slim.cli.options import Whole, options_of, show_next
from mlx_slim.config.schema import QuantizeConfig
from mlx_slim.next_steps import train_on, use_model
from mlx_slim.quantization.options import CompressOptions


@click.command(
    name="quantize",
    epilog="Example: mlx-slim quantize models/mine -o models/mine-4bit --bits 4 --method awq",
)
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="New folder.")
@click.option(
    "--bits", type=Whole(2, 8), default=None, help="2, 3, 4, 5, 6 or 8; default 4 (mxfp8: 8)."
)
@click.option("--group-size", type=Whole(16, 128), default=None, help="32, 64 or 128; default 64.")
@click.option(
    "--mode",
    default=QuantizeConfig.model_fields["mode"].default,
    show_default=True,
    help="affine, mxfp4, mxfp8 or nvfp4.",
)
@options_of(
    CompressOptions,
    "method",
    "embed_bits",
    "recipe",
    "calibration",
    "samples",
    "length",
    "fidelity_samples",
    "revision",
)
@click.option(
    "--target-bytes",
    metavar="SIZE",
    help="Choose the bits of each layer: files of weights of at most SIZE (300MB).",
)
@options_of(CompressOptions, "bits_per_weight", "sensitivity", "sensitivity_samples", "compensate")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def command(
    model: str,
    output: Path,
    bits: int | None,
    group_size: int | None,
    mode: str,
    target_bytes: str | None,
    bits_per_weight: float | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Quantize MODEL (a folder or hub id) into a new MLX folder.

    Prints bits per weight, sizes, the layers left out and why, and the fidelity to the source: mean
    KL divergence and top-1 agreement. With --target-bytes or --bits-per-weight each layer gets bits
    of its own.
    """
    from rich.console import Console as RichConsole

    from mlx_slim.console import Console
    from mlx_slim.quantization.policy import quantize_config
    from mlx_slim.quantization.run import ADAPTERS, compress
    from mlx_slim.units import parse_size

    sized = target_bytes is not None or bits_per_weight is not None
    options = CompressOptions(
        quantize_config(bits, group_size, mode, sized=sized),
        target_bytes=None if target_bytes is None else parse_size(target_bytes),
        bits_per_weight=bits_per_weight,
        **settings,
    )
    output_of_notices = RichConsole(highlight=False, stderr=as_json)
    with Console("quiet" if as_json else "plain", output=output_of_notices) as console:
        result = compress(model, output, options, console)
    if as_json:
        click.echo(json.dumps(result.as_record()))
        return
    for line in result.lines():
        click.echo(line)
    adapters = [] if result.compensated is None else [output / ADAPTERS]
    show_next(*use_model(output, adapters), train_on(output, "smollm2-qlora"))
