"""Curves: points stand where their numbers say, and what is no number is left out."""

from __future__ import annotations

import math
import re

import pytest

from mlx_slim.finetuning.curves import Level, Series, chart, smooth, thinned, ticks


def circles(svg: str) -> list[tuple[float, float]]:
    matches = re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="3.6"', svg)
    return [(float(x), float(y)) for x, y in matches]


def test_higher_is_higher_and_later_is_to_the_right() -> None:
    points = [(1.0, 2.0), (2.0, 4.0), (3.0, 3.0)]
    svg = chart("x", [Series("", points, "--c1", "dots")], y=str)
    (x1, y1), (x2, y2), (x3, y3) = circles(str(svg))
    assert x1 < x2 < x3 and y2 < y3 < y1
    assert (y1 - y3) == pytest.approx((y1 - y2) / 2, abs=0.1)


def test_numbers_that_are_none_are_left_out_and_nothing_is_none() -> None:
    points = [(1.0, math.nan), (2.0, 1.0), (3.0, math.inf)]
    assert len(circles(str(chart("x", [Series("", points, "--c1")], y=str)))) == 1
    assert chart("x", [Series("", points[:1], "--c1")], y=str) is None
    assert chart("x", [], y=str) is None


def test_one_point_and_equal_points_have_a_place() -> None:
    for points in ([(5.0, 0.0)], [(5.0, 0.0), (6.0, 0.0)], [(5.0, -3.0)]):
        svg = str(chart("x", [Series("", points, "--c1", "dots")], y=str))
        assert all(0 < x < 480 and 0 < y < 250 for x, y in circles(svg))


def test_levels_widen_the_axis_and_labels_are_escaped() -> None:
    svg = str(
        chart("<x>", [Series("<a>", [(1, 1), (2, 2)], "--c1")], y=str, levels=[Level(9, "<b>")])
    )
    assert "&lt;b&gt;" in svg and "&lt;x&gt;" in svg and "<b>" not in svg
    assert re.search(r'd="M58.0 (\d+\.\d)H', svg)


def test_thinning_keeps_both_ends_and_every_spike() -> None:
    points = [(float(i), 1.0) for i in range(10_000)]
    points[4321] = (4321.0, 99.0)
    thin = thinned(points)
    assert len(thin) <= 302 and thin[0][0] == 0 and thin[-1][0] == 9999
    assert (4321.0, 99.0) in thin and thin == sorted(thin)


def test_smoothing_is_a_mean_from_the_first_point_on() -> None:
    assert smooth([(1, 5.0), (2, 5.0)]) == [(1, 5.0), (2, 5.0)]
    means = [y for _, y in smooth([(float(i), float(i % 2)) for i in range(400)])]
    assert all(abs(mean - 0.5) < 0.05 for mean in means[50:])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.1, 5.9), (0, 7e9), (1e-5, 3e-4), (-2, 2)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    values = ticks(low, high)
    assert 2 <= len(values) <= 6
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in values)
    assert ticks(2, 2) == [2]
