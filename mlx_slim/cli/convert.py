"""``mlx-slim convert``: hub id, Hugging Face folder or GGUF file to a checked MLX folder.

Try it: ``mlx-slim convert model.gguf -o model-mlx``.
"""

from __future__ import annotations

from pathlib import Path

import click

from mlx_slim.cli.options import alive, show_next
from mlx_slim.next_steps import step, train_on


@click.command(name="convert", epilog="Example: mlx-slim convert model.gguf -o models/mine")
@click.argument("source")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Cast floating weights; quantized codes stay.",
)
@click.option("--dequantize", is_flag=True, help="Write dense weights instead of quantized codes.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python files the repository brings.")
def command(
    source: str,
    output: Path,
    dtype: str | None,
    dequantize: bool,
    revision: str | None,
    trust_remote_code: bool,
) -> None:
    """Convert SOURCE (hub id, folder or .gguf) to an MLX folder, reload it and compare."""
    from mlx_slim.models.convert import convert
    from mlx_slim.runtime import human_bytes, resolve_dtype

    with alive():
        report = convert(
            source,
            output,
            dtype=resolve_dtype(dtype) if dtype else None,
            dequantize=dequantize,
            revision=revision,
            trust_remote_code=trust_remote_code,
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
