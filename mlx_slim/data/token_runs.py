"""Sequences of tokens as runs: what several of them begin with is one run, computed once.

Invariant: the runs on the path to the end of a sequence are that sequence, and the choice depends
on the sequences alone. A run too short to be worth a row of its own is computed again in each
sequence. Scoring plans batches from it (``evaluation/scoring/prefix_tree.py``), training
micro-batches (``data/shared.py``).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

ROW_COST = 4  # tokens: overhead of a row, docs/lab-log.md


@dataclass(frozen=True)
class TokenRun:
    """Positions ``begin`` to ``end`` of the sequences ``low`` to ``high``, and what follows."""

    begin: int
    end: int
    low: int
    high: int
    after: tuple[TokenRun, ...]


_State = tuple[int, int, int]  # low, high, begin
_Way = tuple[int, tuple[TokenRun, ...]]  # cost in tokens, and the runs


def plan(sequences: Sequence[Sequence[int]]) -> tuple[TokenRun, ...]:
    """Return the runs that compute sorted, distinct sequences at the least cost.

    Where sequences share the positions ``begin`` to ``end``, these are one run, or, where they are
    at most ``ROW_COST``, each child may compute them again. Where one sequence ends at ``end``, it
    needs the run anyway, so the others share it. Each state is computed after those it depends on,
    from an explicit stack: prefixes may be nested to any depth.

    Args:
        sequences: Token ids, in lexicographic order, none twice.
    """
    if not sequences:
        return ()
    ways: dict[_State, _Way] = {}
    splits: dict[tuple[int, int], tuple[int, list[tuple[int, int]]]] = {}
    stack: list[_State] = [(0, len(sequences), 0)]
    while stack:
        state = low, high, begin = stack[-1]
        if (low, high) not in splits:
            splits[low, high] = _groups_after(sequences, low, high, begin)
        end, groups = splits[low, high]
        ended = len(sequences[low]) == end
        starts = [end] if end > begin and (ended or end - begin > ROW_COST) else [begin, end]
        needed = {(*group, start) for start in starts for group in groups}
        if missing := [other for other in needed if other not in ways]:
            stack += missing
            continue
        stack.pop()

        def joined(start: int, groups: list[tuple[int, int]] = groups) -> _Way:
            each = [ways[(*group, start)] for group in groups]
            return sum(cost for cost, _ in each), tuple(run for _, runs in each for run in runs)

        if end == begin:
            ways[state] = joined(begin)
            continue
        cost, after = joined(end)
        shared = end - begin + ROW_COST + cost, (TokenRun(begin, end, low, high, after),)
        again = joined(begin) if begin in starts else shared
        ways[state] = min(shared, again, key=lambda way: way[0])
    return ways[0, len(sequences), 0][1]


def _groups_after(
    sequences: Sequence[Sequence[int]], low: int, high: int, begin: int
) -> tuple[int, list[tuple[int, int]]]:
    """Return where sequences equal up to ``begin`` differ, and the ranges of equal next ids."""
    first, last = sequences[low], sequences[high - 1]
    end, most = begin, min(len(first), len(last))
    while end < most and first[end] == last[end]:
        end += 1
    groups: list[tuple[int, int]] = []
    index = low + (len(first) == end)
    while index < high:
        token = sequences[index][end]
        if sequences[high - 1][end] == token:
            stop = high
        else:
            stop = bisect.bisect_right(sequences, token, index, high, key=lambda s: s[end])
        groups.append((index, stop))
        index = stop
    return end, groups
