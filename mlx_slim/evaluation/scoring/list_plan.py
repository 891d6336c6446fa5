"""Lists of tokens for a CPU: the runs of whole requests, one behind the other.

A CPU computes everything but attention over one list without padding (``models/token_list.py``), so
its products have many rows and a context needs no cache between itself and its continuations. Where
too much follows a run for one list, the run is computed first and alone, and what follows sees its
keys and values. Invariant: every node is computed once, after the nodes on its path, and the lists
follow from the nodes, the size and the number of threads alone. Try it:
``python -m pytest tests/evaluation/scoring/test_list_plan.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_slim.data.collate import TokenNode
from mlx_slim.evaluation.scoring.prefix_tree import Node

LEAST = 64  # positions: a smaller list only costs overhead


@dataclass(frozen=True)
class ScoredList:
    """Runs of tokens that are computed at a time.

    Attributes:
        tokens: Of all runs, one behind the other.
        nodes: Where each run is, and what it sees.
        pairs: (position, request, target id) of what is scored.
    """

    tokens: list[int]
    nodes: list[TokenNode]
    pairs: list[tuple[int, int, int]]


def subtrees(nodes: Sequence[Node]) -> list[range]:
    """Return for each node, parents before children, the indices of it and of all below it."""
    stops = list(range(1, len(nodes) + 1))
    for index in reversed(range(len(nodes))):
        if (parent := nodes[index].parent) >= 0:
            stops[parent] = max(stops[parent], stops[index])
    return [range(index, stop) for index, stop in enumerate(stops)]


def listed(nodes: Sequence[Node], tops: Sequence[range]) -> ScoredList:
    """Return the list of some subtrees, each seen as if its first node had nothing before it."""
    tokens: list[int] = []
    pairs: list[tuple[int, int, int]] = []
    placed: dict[int, TokenNode] = {}
    for top in tops:
        for index in top:
            node, parent = nodes[index], placed.get(nodes[index].parent)
            begin = len(tokens)
            tokens += node.tokens
            path = () if parent is None else (*parent.path, (parent.begin, parent.end))
            depth = node.offset - nodes[top[0]].offset
            placed[index] = TokenNode(begin, len(tokens), depth, path)
            pairs += [
                (begin + position, request, target)
                for position, targets in node.scored.items()
                for request, target in targets
            ]
    return ScoredList(tokens, list(placed.values()), pairs)


def balanced(sizes: Sequence[int], budget: int, threads: int) -> list[list[int]]:
    """Return indices of ``sizes`` in groups of like size, ``budget`` at most.

    Args:
        sizes: Positions of each subtree, none more than ``budget``.
        budget: Positions of a group.
        threads: Groups that are computed side by side.
    """
    total = sum(sizes)
    rounds = math.ceil(total / (threads * budget))
    count = max(1, min(rounds * threads, total // LEAST, len(sizes)))
    groups: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = loads.index(min(loads))
        if loads[least] and loads[least] + sizes[index] > budget:
            least = len(groups)
            groups, loads = [*groups, []], [*loads, 0]
        groups[least].append(index)
        loads[least] += sizes[index]
    return [sorted(group) for group in groups if group]
