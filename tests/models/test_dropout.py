"""Masks that are drawn again: the same ones, and the global random state goes its way once."""

from __future__ import annotations

import mlx.core as mx

from mlx_slim.models.dropout import dropout_again, dropout_mask


def test_masks_are_those_of_the_global_state_and_are_drawn_again() -> None:
    mx.random.seed(3)
    plain = [dropout_mask(0.5, (4, 8)) for _ in range(3)]
    after = mx.random.uniform(shape=(4,))
    mx.random.seed(3)
    keys: list[mx.array] = []
    with dropout_again(keys):
        first = [dropout_mask(0.5, (4, 8)) for _ in range(3)]
    assert len(keys) == 3
    with dropout_again(keys):
        again = [dropout_mask(0.5, (4, 8)) for _ in range(3)]
    for one, two, three in zip(plain, first, again, strict=True):
        assert mx.array_equal(one, two) and mx.array_equal(one, three)
    assert mx.array_equal(mx.random.uniform(shape=(4,)), after)
