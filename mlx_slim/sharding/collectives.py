"""Gathers and sums over ranks inside a lazy graph, in one order on every rank.

Invariant: each collective depends on the one that was built before it. MLX evaluates a graph in an
order that follows from its shape, and the graphs of two ranks may differ in shape (other rows,
other chunks of the loss); collectives that pair up by their order alone would then mix tensors or
wait for ever. They run on the CPU's stream, where ring, MPI and JACCL have them.
Try it: ``python -m pytest tests/sharding/test_model.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import mlx.core as mx

from mlx_slim.ranks.collectives import gathered_bytes, summed_bytes
from mlx_slim.ranks.state import state
from mlx_slim.sharding.layout import Slice

# A tensor of this many bytes travels alone, without a copy; smaller ones of one dtype travel in one
# buffer: each message costs a round trip.
_ALONE = 1 << 18


class Collectives:
    """The collectives of one model, in the order in which they are built.

    Args:
        group: The ranks.

    Attributes:
        size, rank: Of the group.
        looking: Whether the model is looked at, and nothing is gathered.
    """

    def __init__(self, group: mx.distributed.Group) -> None:
        self._group = group
        self.size, self.rank = group.size(), group.rank()
        self.looking = False
        self._last: mx.array | None = None

    def settle(self) -> None:
        """Begin a new order: all that was built before has been evaluated, or never will be."""
        self._last = None

    def gather(
        self,
        slices: Mapping[str, mx.array],
        layout: Mapping[str, Slice],
        after: Sequence[mx.array] = (),
    ) -> dict[str, mx.array]:
        """Return the whole tensors of ``slices``, whose places are in ``layout``.

        Args:
            slices: path -> this rank's slice; each keeps its dtype.
            layout: path -> place of that tensor, and maybe of others.
            after: Nothing is gathered before these are computed: gathered tensors would wait for
                them in memory.
        """
        whole = {path: value for path, value in slices.items() if not layout[path].rows}
        cut = {path: value for path, value in slices.items() if layout[path].rows}
        for paths in _buckets(cut):
            if len(paths) == 1:
                gathered = self._all_gather(cut[paths[0]], after)
                whole[paths[0]] = layout[paths[0]].trim(gathered)
                continue
            flat = mx.concatenate([cut[path].reshape(-1) for path in paths])
            table = self._all_gather(flat, after).reshape(self.size, -1)
            for path, columns in _columns(paths, cut, table):
                gathered = columns.reshape(-1, *layout[path].shape[1:])
                whole[path] = layout[path].trim(gathered)
        return {path: whole[path] for path in slices}

    def reduce(
        self,
        gradients: Mapping[str, mx.array],
        layout: Mapping[str, Slice],
        after: Sequence[mx.array] = (),
    ) -> dict[str, mx.array]:
        """Return this rank's slices of the sums over all ranks, float32.

        A sum of everything and a cut: ``sum_scatter``, which would send half of the bytes, is in
        neither the ring nor MPI.
        """
        gradients = {path: value.astype(mx.float32) for path, value in gradients.items()}
        slices = {}
        for paths in _buckets(gradients):
            if len(paths) == 1:
                total = self._all_sum(gradients[paths[0]], after)
                slices[paths[0]] = layout[paths[0]].cut(total, self.rank)
                continue
            flat = mx.concatenate([gradients[path].reshape(-1) for path in paths])
            table = self._all_sum(flat, after)[None]
            for path, columns in _columns(paths, gradients, table):
                whole = columns.reshape(layout[path].shape)
                slices[path] = layout[path].cut(whole, self.rank)
        return {path: slices[path] for path in gradients}

    def total(self, value: mx.array) -> mx.array:
        """Return the sum over all ranks of a small array that is read at once."""
        return mx.distributed.all_sum(value, group=self._group, stream=mx.cpu)

    def _all_gather(self, value: mx.array, after: Sequence[mx.array]) -> mx.array:
        state.sent["slices"] += gathered_bytes(value.nbytes, self.size)
        value = self._ordered(value, after)
        return self._done(mx.distributed.all_gather(value, group=self._group, stream=mx.cpu))

    def _all_sum(self, value: mx.array, after: Sequence[mx.array]) -> mx.array:
        state.sent["gradients"] += summed_bytes(value.size, value.itemsize, self.size)
        value = self._ordered(value, after)
        return self._done(mx.distributed.all_sum(value, group=self._group, stream=mx.cpu))

    def _ordered(self, value: mx.array, after: Sequence[mx.array]) -> mx.array:
        before = [*after, *([] if self._last is None else [self._last])]
        return mx.depends([value], before)[0] if before else value

    def _done(self, result: mx.array) -> mx.array:
        # One number, computed: what depended on all of the result would keep it in memory. No
        # gradient flows along the order.
        one = mx.add(result.reshape(-1)[:1], result.reshape(-1)[:1], stream=mx.cpu)
        self._last = mx.stop_gradient(one)
        return result


def _buckets(arrays: Mapping[str, mx.array]) -> Iterator[list[str]]:
    """Yield the paths that travel in one message: a large tensor alone, small ones by dtype."""
    small: dict[mx.Dtype, list[str]] = {}
    for path, value in arrays.items():
        if value.nbytes >= _ALONE:
            yield [path]
        else:
            small.setdefault(value.dtype, []).append(path)
    yield from small.values()


def _columns(
    paths: Sequence[str], arrays: Mapping[str, mx.array], table: mx.array
) -> Iterator[tuple[str, mx.array]]:
    """Yield each path with its columns of ``table``, which holds the arrays side by side."""
    begin = 0
    for path in paths:
        end = begin + arrays[path].size
        yield path, table[:, begin:end]
        begin = end
