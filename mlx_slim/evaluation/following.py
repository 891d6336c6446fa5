"""Answers of a model that is divided over ranks: rank 0 leads, the others compute along.

Invariant: rank 0 alone reads prompts and prints; each prompt's tokens reach every rank before the
first pass, and rank 0's sampled tokens are everyone's (``agreed_sampler``). Try it:
``mlx.launch -n 2 --backend ring -- mlx-slim generate MODEL --parallel tensor --prompt Hello``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mlx_slim.agreement import first
from mlx_slim.evaluation.chat import ChatSession
from mlx_slim.evaluation.divided import announce
from mlx_slim.models.parallel import divided_by
from mlx_slim.runtime import leads


def follow(session: ChatSession) -> None:
    """Compute the answers that rank 0 announces, until it has no more."""
    while (prompt := first(None, patient=True)) is not None:
        for _ in session.stream(**prompt):
            pass


@contextmanager
def leading(session: ChatSession) -> Iterator[bool]:
    """Inside, whether this rank reads and prints; the others have followed when it begins.

    An interrupt in the middle of an answer ends all ranks: those that wait for a token hear of
    nothing else.
    """
    if divided_by(session.model) is None or leads():
        try:
            yield True
        except Exception:
            announce(session.model, None)
            raise
        announce(session.model, None)
    else:
        follow(session)
        yield False
