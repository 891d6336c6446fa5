"""Prefix tree of requests: every shared run of tokens is computed once.

Invariant: the tokens on the path from a root to a node are a prefix of some request's inputs, each
request's inputs are one such path, and every scored position lies in exactly one node of it. A run
too short to be worth a row of its own is computed again in each child. The choice depends on the
requests alone, so the same requests always give the same prefix tree.

    "Question: " ─┬─ "Which … ? Answer:" ─┬─ " the sun"
                  │                       └─ " the moon"
                  └─ "What … ? Answer:"   ─── …
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from mlx_slim.data.token_runs import TokenRun, plan
from mlx_slim.evaluation.scoring.requests import Request, shared_length

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
        forest = plan(sequences)
    else:
        forest = tuple(TokenRun(0, len(s), i, i + 1, ()) for i, s in enumerate(sequences))
        longest = max((len(s) for s in sequences), default=1)
    nodes: list[Node] = []
    leaves = [-1] * len(sequences)  # index of the node that each sequence ends in
    pending = [(run, -1) for run in reversed(forest)]
    while pending:
        run, parent = pending.pop()
        for begin in range(run.begin, run.end, longest):
            tokens = sequences[run.low][begin : min(begin + longest, run.end)]
            level = nodes[parent].level + 1 if parent >= 0 else 0
            if parent >= 0:
                nodes[parent].inner = True
            nodes.append(Node(tokens, parent, begin, level))
            parent = len(nodes) - 1
        if len(sequences[run.low]) == run.end:  # a prefix of the others is sorted before them
            leaves[run.low] = parent
        pending += [(child, parent) for child in reversed(run.after)]
    place = {sequence: index for index, sequence in enumerate(sequences)}
    for index, request in enumerate(requests):
        at = leaves[place[request.inputs]]
        while at >= 0 and nodes[at].offset + len(nodes[at].tokens) >= request.start:
            node = nodes[at]
            first = max(0, request.start - 1 - node.offset)
            for position in range(first, len(node.tokens)):
                target = request.ids[node.offset + position + 1]
                node.scored.setdefault(position, []).append((index, target))
            at = node.parent
    return nodes


def batches(nodes: Sequence[Node], indices: Sequence[int], budget: int) -> list[list[int]]:
    """Return ``indices`` of nodes in batches of at most ``budget`` positions, padding included.

    Rows are sorted longest first; batch boundaries minimize the total positions. A row that
    is longer than the budget is a batch by itself.
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
