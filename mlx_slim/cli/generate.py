"""``mlx-slim generate``: one prompt, one answer.

Invariant: standard output holds the answer and nothing else; statistics are a line on standard
error. Try it: ``mlx-slim generate MODEL --prompt "Name three fruits." --max-tokens 40``.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from mlx_slim.cli.options import options_of, show_next
from mlx_slim.cli.speaker import open_and_tell
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.options import GenerateOptions
from mlx_slim.next_steps import step, train_on

if TYPE_CHECKING:
    from mlx_slim.evaluation.chat import ChatSession


def _read() -> str:
    """Return standard input, up to one character above the limit."""
    from mlx_slim.evaluation.chat import LONGEST_PROMPT

    return sys.stdin.read(LONGEST_PROMPT + 1)


@click.command(epilog='Example: mlx-slim generate models/mine --prompt "Name three fruits."')
@click.argument("model")
@options_of(GenerateOptions)
@click.option("--prompt", required=True, metavar="TEXT", help="The prompt; - reads it from stdin.")
@click.option("--no-chat-template", is_flag=True, help="Continue the prompt as plain text.")
def command(model: str, prompt: str, no_chat_template: bool, **chosen: Any) -> None:
    """Complete one prompt with MODEL (a folder or a hub id).

    An instruct model answers in its chat template; a base model continues the text.
    """
    options = GenerateOptions(**chosen)
    if options.system is not None and no_chat_template:
        raise SlimError("--system needs the chat template", "leave --no-chat-template out")
    import mlx.core as mx

    from mlx_slim.evaluation.following import leading
    from mlx_slim.runtime import from_first_rank

    text = from_first_rank(lambda: _prompt(prompt))
    speaker = open_and_tell(model, options)
    mx.random.seed(options.seed)
    with leading(speaker) as leads:
        if leads:
            _answer(speaker, text, options, no_chat_template=no_chat_template)
    if leads:
        on = [word for one in options.adapter for word in ("--adapter", one)]
        show_next(step("talk with it", "mlx-slim", "chat", model, *on), train_on(model))


def _prompt(prompt: str) -> str:
    text = _read() if prompt == "-" else prompt
    if not text.strip():
        raise SlimError("the prompt is empty", "give it some text")
    return text


def _answer(
    speaker: ChatSession, text: str, options: GenerateOptions, *, no_chat_template: bool
) -> None:
    """Print the answer to ``text``, and its figures."""
    from mlx_slim.units import human_bytes

    system = options.system
    as_chat = not no_chat_template and speaker.tokenizer.has_chat_template
    if as_chat or system is not None:
        messages = [{"role": "system", "content": system}] if system is not None else []
        ids = speaker.chat_ids([*messages, {"role": "user", "content": text}])
    else:
        ids = speaker.text_ids(text)
    for piece in speaker.stream(ids, max_tokens=options.max_tokens, temperature=options.temp):
        click.echo(piece, nl=False)
    click.echo()
    if reply := speaker.timed_without_draft():
        click.echo(
            f"{reply.prompt_tokens} prompt tokens, {reply.tokens} tokens "
            f"at {reply.tokens_per_second:.1f} tokens/s, "
            f"peak memory {human_bytes(reply.peak_memory_bytes)}, end: {reply.stop_reason}",
            err=True,
        )
        if reply.draft is not None:
            click.echo(str(reply.draft), err=True)
