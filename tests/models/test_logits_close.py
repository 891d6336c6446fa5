"""Comparisons of logits: what is close by the table, and what a message says."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest

from mlx_slim.models.logits_close import TOLERANCES, Change, logits_close, rounding


@pytest.mark.parametrize("change", list(Change))
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_table_decides_by_change_and_dtype(change: Change, dtype: mx.Dtype) -> None:
    tolerance = TOLERANCES[change][0 if dtype == mx.float32 else 1]
    expected = mx.array([4.0, -8.0, 0.0]).astype(dtype)
    within = expected.astype(mx.float32) + mx.array([0.0, 0.0, 7.9 * tolerance])
    beyond = expected.astype(mx.float32) + mx.array([0.0, 0.0, 8.1 * tolerance])
    assert logits_close(within, expected, change).close
    assert not logits_close(beyond, expected, change).close


def test_sixteen_bits_on_either_side_count() -> None:
    wide, half = mx.array([1.0, 1.03]), mx.array([1.0, 1.0]).astype(mx.float16)
    assert logits_close(wide, half, Change.SHAPES).close
    assert logits_close(half, wide, Change.SHAPES).close
    assert not logits_close(half.astype(mx.float32), wide, Change.SHAPES).close


@pytest.mark.parametrize("place", [0, 1])
def test_a_value_that_is_no_number_is_never_close(place: int) -> None:
    sides = [mx.array([1.0, 2.0]), mx.array([1.0, 2.0])]
    sides[place] = mx.array([1.0, math.nan])
    assert not logits_close(sides[0], sides[1], Change.WEIGHTS, tolerance=1.0).close


def test_the_message_has_the_value_seen_and_the_value_expected() -> None:
    difference = logits_close(mx.array([10.0, 0.5]), mx.array([10.0, 0.0]), Change.HEAD)
    assert str(difference) == "logits differ by 0.5, expected at most 0.01 (largest logit 10)"


def test_rounding_grows_with_the_root_of_the_depth() -> None:
    assert rounding(4, mx.bfloat16) == pytest.approx(4 * 2**-8 * 2)
    assert rounding(16, mx.float32, mx.bfloat16) == pytest.approx(4 * 2**-8 * 4)
    assert rounding(100, mx.float32) == TOLERANCES[Change.WEIGHTS][0]
