"""Trees of requests: every scored position once, nothing computed twice for nothing."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest

from mlx_slim.data import token_runs
from mlx_slim.evaluation.scoring import prefix_tree
from mlx_slim.evaluation.scoring.requests import Request


def _random_requests(seed: int, count: int = 60) -> list[Request]:
    """Requests that branch off from each other's prefixes, duplicates among them."""
    draw = random.Random(seed)
    prefixes: list[tuple[int, ...]] = [()]
    requests = []
    for _ in range(count):
        base = draw.choice(prefixes)
        base = base[: draw.randint(0, len(base))]
        ids = base + tuple(draw.randint(0, 3) for _ in range(draw.randint(2, 14)))
        prefixes.append(ids)
        requests.append(Request(ids, draw.randint(1, len(ids) - 1)))
    return requests + requests[:3]


def _scored_targets(requests: list[Request]) -> set[tuple[int, int, int]]:
    """(request, input position, target) of everything that must be scored."""
    return {
        (index, place - 1, request.ids[place])
        for index, request in enumerate(requests)
        for place in range(request.start, len(request.ids))
    }


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("longest", [3, 100])
@pytest.mark.parametrize("sharing", [True, False])
def test_paths_spell_the_inputs_and_every_target_is_scored_once(
    seed: Any, longest: int, sharing: bool
) -> None:
    requests = _random_requests(seed)
    nodes = prefix_tree.build(requests, longest=longest, sharing=sharing)
    scored = []
    paths: list[tuple[int, ...]] = []
    for index, node in enumerate(nodes):
        assert node.parent < index
        before = paths[node.parent] if node.parent >= 0 else ()
        assert len(before) == node.offset
        assert node.level == (nodes[node.parent].level + 1 if node.parent >= 0 else 0)
        assert node.inner == any(other.parent == index for other in nodes)
        assert 1 <= len(node.tokens) <= (longest if sharing else 100)
        paths.append(before + node.tokens)
        for position, pairs in node.scored.items():
            for request, target in pairs:
                end = node.offset + position
                assert requests[request].ids[: end + 1] == paths[index][: end + 1]
                scored.append((request, end, target))
    assert len(scored) == len(set(scored))
    assert set(scored) == _scored_targets(requests)


@pytest.mark.parametrize("seed", range(8))
def test_the_minimum_is_the_number_of_distinct_prefixes(seed: Any) -> None:
    requests = _random_requests(seed)
    prefixes = {
        request.inputs[:end] for request in requests for end in range(1, len(request.inputs) + 1)
    }
    assert prefix_tree.fewest_tokens(requests) == len(prefixes)
    computed = sum(len(node.tokens) for node in prefix_tree.build(requests, longest=100))
    assert computed >= len(prefixes)


def test_a_long_shared_run_is_computed_once_and_a_short_one_again() -> None:
    context = tuple(range(10, 40))
    requests = [Request((*context, ending, 1, 2, 3), 30) for ending in range(4)]
    nodes = prefix_tree.build(requests, longest=100)
    assert [len(node.tokens) for node in nodes] == [30, 3, 3, 3, 3]
    assert nodes[0].scored == {29: [(index, index) for index in range(4)]}
    two = [Request((7, *([i] * 9)), 5) for i in range(2)]  # one token in common: not worth a row
    assert [len(node.tokens) for node in prefix_tree.build(two, longest=100)] == [9, 9]


def test_one_token_answers_are_one_pass() -> None:
    requests = [Request((5, 6, 7, letter), 3) for letter in (1, 2, 3, 4)]
    (node,) = prefix_tree.build(requests, longest=100)
    assert node.tokens == (5, 6, 7)
    assert node.scored == {2: [(0, 1), (1, 2), (2, 3), (3, 4)]}


def test_batches_hold_every_row_once_and_keep_the_budget() -> None:
    draw = random.Random(1)
    lengths = [draw.randint(1, 60) for _ in range(100)] + [300]
    nodes = [prefix_tree.Node((0,) * length, -1, 0, 0) for length in lengths]
    groups = prefix_tree.batches(nodes, range(len(nodes)), 128)
    assert sorted(i for rows in groups for i in rows) == list(range(101))
    for rows in groups:
        padded = max(lengths[i] for i in rows) * len(rows)
        assert padded <= 128 or len(rows) == 1
    padding = sum(max(lengths[i] for i in rows) * len(rows) for rows in groups) / sum(lengths)
    assert padding < 1.06
    assert prefix_tree.batches(nodes, [], 128) == []


def _least_cost(sequences: list[tuple[int, ...]], begin: int = 0) -> int:
    """Return the least cost by trying both ways at every shared run, by plain recursion."""
    if len(sequences) == 1:
        left = len(sequences[0]) - begin
        return left + token_runs.ROW_COST if left else 0
    end = begin
    while all(len(s) > end for s in sequences) and len({s[end] for s in sequences}) == 1:
        end += 1
    groups: dict[int, list[tuple[int, ...]]] = {}
    for sequence in sequences:
        if len(sequence) > end:
            groups.setdefault(sequence[end], []).append(sequence)
    ended = any(len(sequence) == end for sequence in sequences)
    row = end - begin + token_runs.ROW_COST if end > begin else 0
    shared = row + sum(_least_cost(group, end) for group in groups.values())
    again = (row if ended else 0) + sum(_least_cost(group, begin) for group in groups.values())
    return min(shared, again)


@pytest.mark.parametrize("seed", range(8))
def test_the_plan_is_the_cheapest_of_all(seed: Any) -> None:
    sequences = sorted({request.inputs for request in _random_requests(seed, 25)})
    pending, cost = list(prefix_tree.plan(sequences)), 0
    while pending:
        run = pending.pop()
        cost += run.end - run.begin + token_runs.ROW_COST
        pending += run.after
    assert cost == _least_cost(sequences)


def test_prefixes_nested_20_000_deep_need_no_recursion() -> None:
    limit = sys.getrecursionlimit()
    depth = 20_000
    pending = list(prefix_tree.plan([range(length) for length in range(1, depth + 1)]))
    ends = []
    while pending:
        run = pending.pop()
        assert run.end == run.begin + 1
        ends.append(run.end)
        pending += run.after
    assert ends == list(range(1, depth + 1))
    assert sys.getrecursionlimit() == limit


def test_every_one_of_1_500_nested_requests_is_scored() -> None:
    ids = tuple(range(1502))
    requests = [Request(ids[:length], length - 1) for length in range(2, 1502)]
    nodes = prefix_tree.build(requests, longest=100)
    scored = [pair for node in nodes for pairs in node.scored.values() for pair in pairs]
    assert sorted(scored) == [(index, index + 1) for index in range(1500)]
    assert sum(len(node.tokens) for node in nodes) == prefix_tree.fewest_tokens(requests)
