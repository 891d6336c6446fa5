"""``mlx-slim convert``: hub id, Hugging Face folder or GGUF file to a checked MLX folder.

Try it: ``mlx-slim convert model.gguf -o model-mlx``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_slim.cli.options import alive, options_of, show_next
from mlx_slim.models.options import ConvertOptions
from mlx_slim.next_steps import step, train_on


@click.command(name="convert", epilog="Example: mlx-slim convert model.gguf -o models/mine")
@click.argument("source")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write."
)
@options_of(ConvertOptions)
def command(source: str, output: Path, dtype: str | None, **options: Any) -> None:
    """Convert SOURCE (hub id, folder or .gguf) to an MLX folder, reload it and compare."""
    from mlx_slim.models.convert import convert
    from mlx_slim.runtime import resolve_dtype
    from mlx_slim.units import human_bytes

    with alive():
        report = convert(
            source,
            output,
            dtype=resolve_dtype(dtype) if dtype else None,
            **options,
        )
    click.echo(f"{report.path}: {report.parameters:,} parameters in {report.tensors} tensors")
    click.echo(
        f"  {human_bytes(report.bytes)}, {report.bits_per_weight:.2f} bits per weight, "
        f"{report.dtype}"
    )
    for note in report.notes:
        click.echo(f"  {note}")
    same = "equal to the source's, bit for bit" if report.exact else f"KL {report.kl:.2g} nats"
    click.echo(f"  reloaded and compared: logits {same}")
    show_next(
        step("talk with it", "mlx-slim", "chat", output),
        step("make it smaller", "mlx-slim", "quantize", output, "-o", f"{output}-4bit"),
        train_on(output),
    )
