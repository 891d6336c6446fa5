"""Serving over several ranks: what mlx-lm's server does not agree on by itself.

mlx-lm's generation thread sends requests from rank 0, which alone has clients, to the others.
Invariant: all ranks continue with rank 0's tokens, and end with it.
Used by ``serving/generator.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from mlx_lm import server

from mlx_slim.models.parallel import agreed_sampler

_SAMPLER = "_make_sampler"
END = ("end",)  # shared like a request, when rank 0 ends


class LeaderEndedError(Exception):
    """The rank that answers requests ends: no more requests come."""


@contextlib.contextmanager
def agreed_tokens(model: Any) -> Iterator[None]:
    """Inside, all ranks of a divided ``model`` continue with the tokens that rank 0 samples."""
    make = getattr(server, _SAMPLER)

    def agreed(*arguments: Any, **words: Any) -> Any:
        return agreed_sampler(make(*arguments, **words), model)

    setattr(server, _SAMPLER, agreed)
    try:
        yield
    finally:
        setattr(server, _SAMPLER, make)
