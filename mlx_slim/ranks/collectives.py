"""The collectives of a run: one way in, so that what waits in them is seen, timed and counted.

Invariant: what goes in is computed before the collective begins, so the time inside is waiting and
transfer; the result is evaluated. With one rank nothing is sent and the input comes back. The
backends' formulas of bytes a rank sends, N ranks: a sum 2 (N − 1) / N of the array (each rank sums
one slice and passes it on), a gathering N − 1 times it. Try it:
``python -m pytest tests/ranks/test_collectives.py``.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx

from mlx_slim.errors import SlimError
from mlx_slim.ranks.state import resume_hint, state

# For the watchdog to say which rank it is: it hears of an end at once, unless a link is cut.
_VERDICT_SECONDS = 6.0
_BACKEND = re.compile(r"(?i)\[(ring|jaccl|mpi|nccl|distributed)\b|nccl")


class RankLostError(SlimError):
    """A collective failed: a peer is gone, or the link to it."""

    exit_code = 1


@contextlib.contextmanager
def watched(*, patient: bool = False) -> Iterator[None]:
    """Inside, collectives are evaluated; a rank that fails to come is noticed (``watchdog.py``).

    Args:
        patient: There is no limit, because another rank does something alone meanwhile, or because
            what is evaluated computes too; a rank that has died is noticed all the same.

    Raises:
        RankLostError: The backend lost a peer, and the watchdog does not know which.
    """
    try:
        with state.collective(patient=patient):
            yield
    except RuntimeError as error:
        if (lost := lost_peer(error)) is None:
            raise
        raise lost from error


def lost_peer(error: BaseException) -> RankLostError | None:
    """Return what an error of a collective means; None for an error of another kind.

    It waits some seconds: the watchdog ends the process if it knows which rank is missing.
    """
    text = " ".join(str(error).split())
    if not isinstance(error, RuntimeError) or not _BACKEND.match(text):
        return None
    time.sleep(_VERDICT_SECONDS)
    return RankLostError(f"the link to another rank broke: {text[:200]}", resume_hint())


def summed_bytes(count: int, itemsize: int, ranks: int) -> int:
    """Return the bytes that a rank sends for a sum of ``count`` numbers over ``ranks``."""
    return 2 * (ranks - 1) * -(-count // ranks) * itemsize


def gathered_bytes(nbytes: int, ranks: int) -> int:
    """Return the bytes that a rank sends where each gives ``nbytes``."""
    return (ranks - 1) * nbytes


def all_sum(
    array: mx.array, group: mx.distributed.Group, what: str, *, patient: bool = False
) -> mx.array:
    """Return the sum over all ranks, evaluated.

    Args:
        array: Of one shape and dtype on all ranks.
        group: Of the ranks.
        what: The bytes are counted under this name.
        patient: As ``watched``.
    """
    sent = summed_bytes(array.size, array.itemsize, group.size())
    sum_over = partial(mx.distributed.all_sum, group=group)
    return _collected(array, group, sum_over, what, sent, patient)


def all_gather(
    array: mx.array, group: mx.distributed.Group, what: str, *, patient: bool = False
) -> mx.array:
    """Return the arrays of all ranks, one after the other along axis 0; else as ``all_sum``."""
    sent = gathered_bytes(array.nbytes, group.size())
    gather = partial(mx.distributed.all_gather, group=group, stream=mx.cpu)
    return _collected(array, group, gather, what, sent, patient)


def _collected(
    array: mx.array,
    group: mx.distributed.Group,
    collective: Callable[[mx.array], mx.array],
    what: str,
    sent: int,
    patient: bool,
) -> mx.array:
    if group.size() == 1:
        return array
    mx.eval(array)
    state.sent[what] += sent
    with watched(patient=patient):
        result = collective(array)
        mx.eval(result)
    return result
