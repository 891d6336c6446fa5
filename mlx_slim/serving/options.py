"""How to serve: the values that ``mlx-slim serve`` takes.

Invariant: the only home of these defaults; nothing heavy is imported. Try it:
``mlx-slim serve --help``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Interval

from mlx_slim.config.options import option
from mlx_slim.config.parallel import PARALLEL, PARALLEL_OPTION, Parallel
from mlx_slim.config.values import PositiveInt
from mlx_slim.evaluation.options import (
    ANSWERING_CODE,
    ANSWERING_REVISION,
    DRAFT_MODEL,
    DRAFT_TOKENS,
    DRAFT_WIDTH,
    KV_BITS,
    DraftWidth,
    KVBits,
    Temperature,
)


@dataclass(frozen=True)
class ServeOptions:
    """With which adapters, where, and how ``mlx-slim serve`` answers.

    Attributes:
        adapter: Adapter folders (``DIR`` or ``DIR=WEIGHT``); each is a model name of its own.
        host: Address to listen on; the default reaches this machine only.
        port: TCP port; 0 takes a free one.
        max_tokens: Longest answer, tokens, of a request that does not say.
        temp: Temperature of a request that does not say; 0 is greedy.
        kv_bits: Bits of the cache's keys and values; None keeps them in the model's dtype.
        draft_model: Folder or hub id of a smaller model that drafts tokens; None drafts none.
        num_draft_tokens: Tokens that it drafts at a time.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Run Python files that the repository brings.
        parallel: How several ranks divide the model; ``auto`` is ``tensor`` where that can be.
    """

    adapter: tuple[str, ...] = field(
        default=(),
        metadata=option(
            "Adapter that requests may name as their model; repeatable.",
            metavar="DIR[=WEIGHT]",
            multiple=True,
        ),
    )
    host: str = field(
        default="127.0.0.1", metadata=option("Address to listen on.", metavar="ADDRESS")
    )
    port: Annotated[int, Interval(ge=0, le=65535)] = field(
        default=8080, metadata=option("TCP port; 0 takes a free one.")
    )
    max_tokens: PositiveInt = field(
        default=512, metadata=option("Tokens of an answer whose request does not say.")
    )
    temp: Temperature = field(
        default=0.0, metadata=option("Temperature of a request that does not say; 0: greedy.")
    )
    kv_bits: KVBits | None = field(default=None, metadata=KV_BITS)
    draft_model: str | None = field(default=None, metadata=DRAFT_MODEL)
    num_draft_tokens: DraftWidth = field(default=DRAFT_WIDTH, metadata=DRAFT_TOKENS)
    revision: str | None = field(default=None, metadata=ANSWERING_REVISION)
    trust_remote_code: bool = field(default=False, metadata=ANSWERING_CODE)
    parallel: Parallel = field(default=PARALLEL, metadata=PARALLEL_OPTION)
