"""Hyperparameters from counts: each formula at its ends and at points worked out by hand."""

from __future__ import annotations

import pytest

from mlx_slim.planner.hyperparameters import (
    BatchSize,
    batch_size,
    capacity,
    epochs,
    learning_rate,
    rank,
    validate_every,
    validation_rows,
)


def test_the_rate_follows_width_method_and_family() -> None:
    # 5e-4 x (2000/576)^0.781 = 5e-4 x 2.644
    assert learning_rate("lora", 576, "llama")[0] == 0.0013
    assert learning_rate("qlora", 576, "llama")[0] == learning_rate("dora", 576, "llama")[0]
    assert learning_rate("full", 576, "llama")[0] == 0.00013
    assert learning_rate("lora", 2000, "phi")[0] == 5e-4
    assert learning_rate("lora", 4096, "mistral")[0] == 2.9e-4
    assert learning_rate("lora", 896, "qwen2")[0] == 5.3e-4
    assert "(2000 / 896)^0.0775" in learning_rate("lora", 896, "qwen2")[1]


@pytest.mark.parametrize(
    ("tokens", "rows", "expected"),
    [
        (10_000, 160, 3),
        (1_000_000, 9000, 3),
        (3_162_278, 9000, 2),
        (10_000_000, 90_000, 1),
        (10**9, 10**6, 1),
        (1000, 16, 6),  # 24 steps of four rows
        (60, 3, 10),
    ],
)
def test_epochs_fall_with_tokens_and_rise_for_a_handful_of_rows(
    tokens: int, rows: int, expected: float
) -> None:
    assert epochs(tokens, rows)[0] == expected


def test_a_step_is_an_eightieth_within_bounds() -> None:
    assert batch_size(30_000, 63, 80) == BatchSize(376, 1)
    assert batch_size(1000, 63, 80) == BatchSize(256, 1)  # four rows
    assert batch_size(100, 10, 512) == BatchSize(512, 1)  # the longest row fits
    large = batch_size(10**8, 120, 512)
    assert large == BatchSize(4096, 4)  # 16,384 tokens
    odd = batch_size(80 * 9000, 120, 512)
    assert odd == BatchSize(3000, 3)


def test_the_rank_holds_what_the_rows_bring() -> None:
    assert rank(1000, 300_000) == 16
    assert rank(capacity(16, 1000) + 1, 1000) == 32
    assert rank(10**12, 1000) == 128


def test_validation_takes_a_tenth_of_many_rows_and_none_of_three() -> None:
    rows = [3, 4, 16, 32, 50, 160, 1000, 10**6]
    assert [validation_rows(n)[0] for n in rows] == [0, 1, 4, 8, 8, 16, 100, 256]
    assert "too few" in validation_rows(3)[1]
    assert validation_rows(31)[1] == "a quarter of 31 rows, which are few"
    assert validation_rows(32)[1] == "a tenth of 32 rows, at least 8 and at most 256"


def test_three_validations_an_epoch_and_never_too_rarely() -> None:
    assert validate_every(27, 3) == 9
    assert validate_every(5000, 1) == 200
    assert validate_every(90, 0.1) == 3  # of a run of 9 steps
    assert validate_every(1, 3) == 1
