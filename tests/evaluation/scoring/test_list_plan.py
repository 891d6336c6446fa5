"""Lists hold every node once, behind its path, and groups stay below their budget."""

from __future__ import annotations

import random

import pytest

from mlx_slim.evaluation.scoring.list_plan import LEAST, balanced, listed, subtrees
from mlx_slim.evaluation.scoring.prefix_tree import build
from mlx_slim.evaluation.scoring.requests import Request

DRAW = random.Random(11)


def _requests(count: int) -> list[Request]:
    contexts = [tuple(DRAW.randint(0, 9) for _ in range(DRAW.randint(1, 30))) for _ in range(count)]
    return [
        Request((*context, *(DRAW.randint(0, 9) for _ in range(DRAW.randint(1, 8)))), len(context))
        for context in contexts
        for _ in range(3)
    ]


@pytest.mark.parametrize("longest", [5, 64])
def test_a_list_is_its_nodes_and_scores_every_target(longest: int) -> None:
    requests = _requests(20)
    nodes = build(requests, longest=longest)
    below = subtrees(nodes)
    tops = [index for index, node in enumerate(nodes) if node.parent < 0]
    assert [i for top in tops for i in below[top]] == list(range(len(nodes)))
    one = listed(nodes, [below[top] for top in tops])
    assert len(one.tokens) == sum(len(node.tokens) for node in nodes) == one.nodes[-1].end
    ends = {}
    for node in one.nodes:
        places = [p for span in (*node.path, (node.begin, node.end)) for p in range(*span)]
        assert len(places) == node.depth + node.end - node.begin
        for count, place in enumerate(places):
            ends[place] = tuple(one.tokens[p] for p in places[: count + 1])
    scored = sorted((request, ends[place], target) for place, request, target in one.pairs)
    assert scored == sorted(
        (number, request.ids[:end], request.ids[end])
        for number, request in enumerate(requests)
        for end in range(request.start, len(request.ids))
    )


def test_a_subtree_below_its_first_node_begins_at_depth_0() -> None:
    nodes = build([Request((1, 2, 3, 4, 5, 6, 7, 8, 9), 8), Request((1, 2, 3, 4, 5, 6, 1, 1), 6)],
                  longest=6)  # fmt: skip
    children = [index for index, node in enumerate(nodes) if node.parent == 0]
    one = listed(nodes, [subtrees(nodes)[index] for index in children])
    assert [node.depth for node in one.nodes if not node.path] == [0] * len(children)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_groups_are_of_like_size_and_fit(threads: int) -> None:
    for count in (1, 2, 7, 60):
        sizes = [DRAW.randint(1, 200) for _ in range(count)]
        groups = balanced(sizes, 256, threads)
        assert sorted(index for group in groups for index in group) == list(range(count))
        loads = [sum(sizes[index] for index in group) for group in groups]
        assert max(loads) <= 256
        if count == 60:
            assert len(groups) < 1.3 * sum(sizes) / 256 and sorted(loads)[1] > 100
    assert len(balanced([LEAST // 4] * 3, 256, threads)) == 1  # too little to be divided
    assert balanced([], 256, threads) == []
