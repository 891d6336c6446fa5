"""Requests that begin alike, as a tree of token runs: every shared run is computed once.

Invariant: the tokens on the path from a root to a node are a prefix of some request's inputs, each
request's inputs are one such path, and every scored position lies in exactly one node of it. A run
that is too short to pay for a row of its own is computed again by each branch. The choice depends
on the requests alone, so the same requests always make the same tree.

    "Question: " ─┬─ "Which … ? Answer:" ─┬─ " the sun"
                  │                       └─ " the moon"
                  └─ "What … ? Answer:"   ─── …
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from mlx_slim.evaluation.scoring.requests import Request, shared_length

ROW_COST = 4  # tokens: what a row of its own costs beside its tokens, docs/lab-log.md
BATCH_COST = 8  # tokens: the same for a batch


@dataclass
class Node:
    """A run of tokens that one row of a batch computes.

    Attributes:
        tokens: Its token ids, at least one.
        parent: Index of the node before it; -1 for a root.
        offset: Positions on the path before it.
        level: Nodes on the path before it.
        scored: Position in ``tokens`` -> the (request, target id) pairs that it predicts.
        inner: Whether other nodes follow it.
    """

    tokens: tuple[int, ...]
    parent: int
    offset: int
    level: int
    scored: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    inner: bool = False


@dataclass(frozen=True)
class _Run:
    """Positions ``begin`` to ``end`` of the sequences ``low`` to ``high``, and what follows."""

    begin: int
    end: int
    low: int
    high: int
    after: tuple[_Run, ...]


def fewest_tokens(requests: Sequence[Request]) -> int:
    """Return the fewest positions that any scorer must compute: every distinct prefix once."""
    total, before = 0, ()
    for inputs in sorted({request.inputs for request in requests}):
        total += len(inputs) - shared_length(before, inputs)
        before = inputs
    return total


def build(requests: Sequence[Request], *, longest: int, sharing: bool = True) -> list[Node]:
    """Return the nodes that compute ``requests``, parents before children.

    Args:
        requests: What is scored; ``Node.scored`` refers to their places in this sequence.
        longest: Most tokens of a node: longer runs are cut into several.
        sharing: False makes one node of every distinct input, however long: for models whose
            cache cannot be shared.
    """
    sequences = sorted({request.inputs for request in requests})
    if sharing:
        forest = _Planner(sequences).forest()
    else:
        forest = tuple(_Run(0, len(s), i, i + 1, ()) for i, s in enumerate(sequences))
        longest = max((len(s) for s in sequences), default=1)
    nodes: list[Node] = []
    paths: list[list[int]] = [[] for _ in sequences]

    def grow(run: _Run, parent: int, path: list[int]) -> None:
        path = list(path)
        for begin in range(run.begin, run.end, longest):
            tokens = sequences[run.low][begin : min(begin + longest, run.end)]
            level = nodes[parent].level + 1 if parent >= 0 else 0
            if parent >= 0:
                nodes[parent].inner = True
            nodes.append(Node(tokens, parent, begin, level))
            parent = len(nodes) - 1
            path.append(parent)
        for index in range(run.low, run.high):
            if len(sequences[index]) == run.end:
                paths[index] = path
        for child in run.after:
            grow(child, parent, path)

    for run in forest:
        grow(run, -1, [])
    place = {sequence: index for index, sequence in enumerate(sequences)}
    for index, request in enumerate(requests):
        for node in (nodes[i] for i in paths[place[request.inputs]]):
            first = max(0, request.start - 1 - node.offset)
            for position in range(first, len(node.tokens)):
                target = request.ids[node.offset + position + 1]
                node.scored.setdefault(position, []).append((index, target))
    return nodes


class _Planner:
    """Chooses which shared runs become rows: the cheapest way to compute sorted sequences."""

    def __init__(self, sequences: list[tuple[int, ...]]) -> None:
        self._sequences = sequences
        self._known: dict[tuple[int, int, int], tuple[int, tuple[_Run, ...]]] = {}

    def forest(self) -> tuple[_Run, ...]:
        if not self._sequences:
            return ()
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(max(limit, 20_000))  # one level a branching point
        try:
            return self._best(0, len(self._sequences), 0)[1]
        finally:
            sys.setrecursionlimit(limit)

    def _best(self, low: int, high: int, begin: int) -> tuple[int, tuple[_Run, ...]]:
        """Return cost and runs of positions ``begin``… of sequences that agree before it."""
        key = (low, high, begin)
        if key not in self._known:
            self._known[key] = self._choose(low, high, begin)
        return self._known[key]

    def _choose(self, low: int, high: int, begin: int) -> tuple[int, tuple[_Run, ...]]:
        first, last = self._sequences[low], self._sequences[high - 1]
        if high - low == 1:
            if begin == len(first):
                return 0, ()
            return len(first) - begin + ROW_COST, (_Run(begin, len(first), low, high, ()),)
        end = begin + shared_length(first[begin:], last[begin:])
        groups = self._groups(low, high, end)
        ended = len(first) == end  # the first sequence is a prefix of the others
        again: tuple[int, tuple[_Run, ...]] | None = None
        if end - begin <= ROW_COST or len(groups) == 1:  # longer runs are always worth sharing
            again = self._joined(groups, begin)
            if ended and end > begin:
                alone = _Run(begin, end, low, low + 1, ())
                again = again[0] + end - begin + ROW_COST, (alone, *again[1])
        if end == begin:
            assert again is not None
            return again
        cost, after = self._joined(groups, end)
        shared = end - begin + ROW_COST + cost, (_Run(begin, end, low, high, after),)
        return min(shared, again, key=lambda way: way[0]) if again else shared

    def _joined(self, groups: list[tuple[int, int]], begin: int) -> tuple[int, tuple[_Run, ...]]:
        ways = [self._best(low, high, begin) for low, high in groups]
        return sum(cost for cost, _ in ways), tuple(run for _, runs in ways for run in runs)

    def _groups(self, low: int, high: int, end: int) -> list[tuple[int, int]]:
        """Return the ranges of sequences that go on alike at position ``end``."""
        index = low + (len(self._sequences[low]) == end)
        groups: list[tuple[int, int]] = []
        while index < high:
            stop = index + 1
            token = self._sequences[index][end]
            while stop < high and self._sequences[stop][end] == token:
                stop += 1
            groups.append((index, stop))
            index = stop
        return groups


def batches(nodes: Sequence[Node], indices: Sequence[int], budget: int) -> list[list[int]]:
    """Return ``indices`` of nodes in batches of at most ``budget`` positions, padding included.

    Rows go longest first; where a batch ends is chosen for the fewest positions in all. A row that
    is longer than the budget makes a batch of its own.
    """
    order = sorted(indices, key=lambda i: (-len(nodes[i].tokens), -nodes[i].offset, i))
    lengths = [len(nodes[i].tokens) for i in order]
    best: list[tuple[int, int]] = [
        (0, 0)
    ]  # cost of the first n rows, where their last batch begins
    for stop in range(1, len(order) + 1):
        ways = [(best[stop - 1][0] + lengths[stop - 1] + BATCH_COST, stop - 1)]
        for start in range(stop - 2, -1, -1):
            positions = (stop - start) * lengths[start]
            if positions > budget:
                break
            ways.append((best[start][0] + positions + BATCH_COST, start))
        best.append(min(ways))
    cuts = [len(order)]
    while cuts[-1]:
        cuts.append(best[cuts[-1]][1])
    cuts.reverse()
    return [order[start:stop] for start, stop in itertools.pairwise(cuts)]
