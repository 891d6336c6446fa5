"""The chunks of an evaluation, computed by all ranks.

Invariant: chunks come in order, whatever the number of ranks; rank 0 has all of them. Ranks with
the whole model take a chunk each; those of a divided model compute every chunk jointly. Used by
``evaluation/score.py``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import mlx.core as mx

from mlx_slim import runtime
from mlx_slim.evaluation.jobs import Computed, Engine, ScoringJob
from mlx_slim.evaluation.results import encode
from mlx_slim.models.parallel import divided_by


def rounds(job: ScoringJob, engine: Engine, done: int) -> Iterator[tuple[list[bytes], float]]:
    """Yield the next chunks, as ``_pack`` packs them, and the seconds of each.

    Args:
        job: A task or a text.
        engine: The model; divided over the ranks, or whole on each.
        done: Chunks computed before.
    """
    group = runtime.world()
    chunks = job.chunks
    divided = divided_by(engine.model) is not None
    width = 1 if divided else group.size()
    for begin in range(done, len(chunks), width):
        count = min(width, len(chunks) - begin)
        began = time.perf_counter()
        mx.reset_peak_memory()
        packed = b""
        if divided:
            packed = _pack(job.compute(chunks[begin], engine))
        elif group.rank() < count:
            packed = _pack(job.compute(chunks[begin + group.rank()], engine))
        gathered = runtime.all_gather_bytes(packed if group.rank() < count else b"", patient=True)
        yield gathered[:count], (time.perf_counter() - began) / count


def _pack(computed: Computed) -> bytes:
    """Return a chunk as bytes: a line of counts, then the samples."""
    counts = {
        "tokens_computed": computed.tokens_computed,
        "tokens_minimum": computed.tokens_minimum,
        "truncated": computed.truncated,
        "root": computed.root,
        "group": computed.group,
        "peak_memory_bytes": mx.get_peak_memory(),
    }
    return json.dumps(counts).encode() + b"\n" + encode(computed.records)
