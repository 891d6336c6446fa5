"""``mlx-slim export``: an adapter for PEFT, a model for transformers, llama.cpp or Ollama.

Try it: ``mlx-slim export fused --to gguf --type q8_0 -o gguf``.
"""

from __future__ import annotations

from pathlib import Path

import click

from mlx_slim.errors import SlimError

# option -> the targets that know it
_ONLY = {
    "model": ("peft",),
    "base_name": ("peft",),
    "kind": ("gguf",),
    "calibration": ("gguf",),
    "dtype": ("hf",),
    "revision": ("hf", "gguf"),
}


@click.command(
    name="export",
    epilog="Example: mlx-slim export models/fused --to gguf --type q8_0 -o models/gguf",
)
@click.argument("source")
@click.option(
    "--to",
    "target",
    required=True,
    type=click.Choice(["peft", "hf", "gguf"]),
    help="peft: an adapter; hf: a model for transformers and MLX-LM; gguf: for llama.cpp.",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="New folder.")
@click.option("--type", "kind", help="gguf: f16 (default), q8_0, q4_0 or q4_1.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="hf: dtype.")
@click.option("--model", help="peft: the adapter's base, if it moved.")
@click.option("--base-name", help="peft: what base_model_name_or_path says.")
@click.option("--calibration", help="gguf: text to compare on; default Alpaca.")
@click.option("--revision", help="Commit or tag of a hub model.")
def command(source: str, target: str, output: Path, **options: str | None) -> None:
    """Write SOURCE (an adapter or run folder, a model folder or hub id) for another toolkit."""
    set_options = {name: value for name, value in options.items() if value is not None}
    for name in set_options:
        if target not in _ONLY[name]:
            flag = "--type" if name == "kind" else f"--{name.replace('_', '-')}"
            raise SlimError(f"{flag} is not used with --to {target}", f"it is for {_ONLY[name][0]}")
    from mlx_slim.console import Console
    from mlx_slim.export import model as export
    from mlx_slim.export.peft import export_peft

    with Console("plain") as console:
        if target == "peft":
            base = set_options.pop("model", None)
            done = export_peft(Path(source), output, base=base, observer=console, **set_options)
        elif target == "hf":
            done = export.export_hf(source, output, observer=console, **set_options)
        else:
            done = export.export_gguf(source, output, observer=console, **set_options)
    for line in done.lines():
        click.echo(line)
