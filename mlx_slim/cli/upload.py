"""``mlx-slim upload``: a folder on the hub; private, and a dry run, by default.

Try it: ``mlx-slim upload fused --repo me/my-model``.
"""

from __future__ import annotations

from pathlib import Path

import click

from mlx_slim.cli.options import alive, show_next
from mlx_slim.next_steps import step
from mlx_slim.progress import stage


@click.command(name="upload", epilog="Example: mlx-slim upload models/fused --repo me/my-model")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--repo", required=True, metavar="OWNER/NAME", help="Model repository on the hub.")
@click.option("--yes", is_flag=True, help="Upload; without it only print what would happen.")
@click.option("--public", is_flag=True, help="A public repository; default private.")
@click.option("--revision", help="Branch to commit to.")
def command(folder: Path, repo: str, yes: bool, public: bool, revision: str | None) -> None:
    """Upload FOLDER (a model, an adapter or an export) through huggingface-hub."""
    from mlx_slim.export.upload import upload

    with alive(), stage(f"uploading {folder}" if yes else f"checking {folder}"):
        done = upload(folder, repo, yes=yes, public=public, revision=revision)
    for line in done.lines():
        click.echo(line)
    if not yes:
        show_next(step("upload it", "mlx-slim", "upload", folder, "--repo", repo, "--yes"))
