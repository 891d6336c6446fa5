"""A model loaded for ``generate`` and ``chat``; its notes go to standard error.

Invariant: standard output holds the generated text only. Try it: ``mlx-slim chat MODEL``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mlx_slim.cli.options import alive

if TYPE_CHECKING:
    from mlx_slim.evaluation.chat import ChatSession
    from mlx_slim.evaluation.options import GenerateOptions


def open_and_tell(model: str, options: GenerateOptions) -> ChatSession:
    """Return the opened model, its notes printed; later ones are printed as they come.

    Raises:
        SlimError: If the model or an adapter cannot be loaded.
    """
    from mlx_slim.evaluation.chat import open_session
    from mlx_slim.runtime import leads

    def tell(text: str) -> None:
        if leads():
            click.echo(f"\nnote: {text}", err=True)

    with alive():
        speaker = open_session(
            model,
            options.adapter,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            tell=tell,
            kv_bits=options.kv_bits,
            draft_model=options.draft_model,
            num_draft_tokens=options.num_draft_tokens,
            parallel=options.parallel,
        )
    for note in speaker.notes if leads() else ():
        click.echo(note, err=True)
    return speaker
