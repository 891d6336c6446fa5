"""``mlx-slim export``: an adapter for PEFT, a model for transformers, llama.cpp or Ollama.

Try it: ``mlx-slim export fused --to gguf --type q8_0 -o gguf``.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mlx_slim.cli.options import options_of
from mlx_slim.errors import SlimError
from mlx_slim.export.options import (
    GgufAdapterOptions,
    GgufOptions,
    HfOptions,
    OllamaOptions,
    PeftOptions,
)

# target -> the options that it knows
_TARGETS = {"peft": PeftOptions, "hf": HfOptions, "gguf": GgufOptions}
_TARGETS |= {"gguf-adapter": GgufAdapterOptions, "ollama": OllamaOptions}


@click.command(
    name="export",
    epilog="Example: mlx-slim export models/fused --to gguf --type q8_0 -o models/gguf",
)
@click.argument("source")
@click.option(
    "--to",
    "target",
    required=True,
    type=click.Choice(list(_TARGETS)),
    help="peft: an adapter; hf: a model for transformers and MLX-LM; gguf, gguf-adapter: a model, "
    "an adapter for llama.cpp; ollama: a model, or an adapter in its base, for Ollama.",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="New folder.")
@options_of(GgufOptions, "kind")
@options_of(HfOptions, "dtype")
@options_of(PeftOptions, "base", "base_name")
@options_of(GgufOptions, "calibration", "revision")
@click.pass_context
def command(context: click.Context, source: str, target: str, output: Path, **options: Any) -> None:
    """Write SOURCE (an adapter or run folder, a model folder or hub id) for another toolkit."""
    flags = {param.name: param.opts[0] for param in context.command.params}
    names = {to: {one.name for one in fields(owner)} for to, owner in _TARGETS.items()}
    default = ParameterSource.DEFAULT  # each target has its own
    settings = {k: v for k, v in options.items() if context.get_parameter_source(k) is not default}
    for name in settings.keys() - names[target]:
        others = " or ".join(to for to, its in names.items() if name in its)
        raise SlimError(f"{flags[name]} is not used with --to {target}", f"it is for {others}")
    from mlx_slim.console import Console
    from mlx_slim.export import model as export
    from mlx_slim.export.gguf_adapter import export_gguf_adapter
    from mlx_slim.export.ollama import export_ollama
    from mlx_slim.export.peft import export_peft

    with Console("plain") as console:
        if target == "peft":
            done = export_peft(Path(source), output, observer=console, **settings)
        elif target == "gguf-adapter":
            done = export_gguf_adapter(Path(source), output, observer=console, **settings)
        elif target == "hf":
            done = export.export_hf(source, output, observer=console, **settings)
        elif target == "ollama":
            done = export_ollama(source, output, observer=console, **settings)
        else:
            done = export.export_gguf(source, output, observer=console, **settings)
    for line in done.lines():
        click.echo(line)
