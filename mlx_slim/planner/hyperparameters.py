"""Hyperparameters from the rows and the model: what ``mlx-slim train MODEL --data ROWS`` sets.

Invariant: pure functions of counts, so the same model and rows give the same values; each is stated
at its function, with its source. Tokens are real tokens, without padding. Measured against grids on
SmolLM2-135M and a 0.5B: ``docs/lab-log.md``. Try it:
``mlx-slim train MODEL --data rows.jsonl --dry-run``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Peak learning rate, of Thinking Machines' "LoRA Without Regret" (thinkingmachines.ai/blog/lora)
# and the formula that they fitted on it (tinker_cookbook/hyperparam_utils.py).
BASE_RATE = 5.0e-5  # of full fine-tuning at WIDTH
WIDTH = 2000
ADAPTER_FACTOR = 10  # adapters learn best at ten times the rate, nearly whatever their rank
WIDTH_POWER = 0.781
WIDTH_POWER_QWEN = 0.0775
ADAPTER_ALPHA = 32  # theirs, with the standard scale alpha / rank

RANK, MOST_RANK = 16, 128
BITS_PER_PARAMETER = 2  # that a language model stores (arXiv 2404.05405)

SMALL, LARGE = 1_000_000, 10_000_000  # training tokens between which the epochs fall
MOST_EPOCHS = 3  # repeated rows are worth new ones up to about four times (arXiv 2305.16264)

FEW_EPOCHS, FEW_STEPS = 10, 24  # of a handful of rows

STEPS = 80  # of a run of few tokens
LEAST_ROWS = 4  # of a step
MOST_STEP = 16_384  # tokens of a step: the 128 rows of Stanford Alpaca
MOST_MICRO_BATCH = 4096  # tokens; larger ones are no faster

FEW_VALIDATION, MOST_VALIDATION = 8, 256  # rows
PER_EPOCH = 3  # validations
MOST_BETWEEN = 200  # steps from one validation to the next
WARMUP = 0.05


@dataclass(frozen=True)
class BatchSize:
    """An optimizer step, cut into micro-batches.

    Attributes:
        batch_tokens: Computed tokens of a micro-batch.
        accumulate: Micro-batches of a step.
    """

    batch_tokens: int
    accumulate: int


def learning_rate(method: str, width: int, model_type: str) -> tuple[float, str]:
    """Return the peak rate to two figures, and the formula with its numbers.

    rate = 5e-5 · m · (2000 / width)^p with m = 10 for adapters and 1 for all weights, p = 0.0775
    for Qwen and 0.781 for others, which are taken to be like Llama.

    Args:
        method: Of the recipe.
        width: d, the residual stream.
        model_type: Of ``config.json``.
    """
    power = WIDTH_POWER_QWEN if model_type.startswith("qwen") else WIDTH_POWER
    factor = 1 if method == "full" else ADAPTER_FACTOR
    rate = float(f"{BASE_RATE * factor * (WIDTH / width) ** power:.1e}")
    times = "" if factor == 1 else f"{factor} x "
    return rate, f"{times}{BASE_RATE:g} x ({WIDTH} / {width})^{power:g}, as LoRA Without Regret"


def epochs(tokens: int, rows: int) -> tuple[float, str]:
    """Return the passes over the training rows, and why: 3 up to a million tokens, 1 from ten.

    From one million to ten they fall with the logarithm, in tenths. Fewer than 32 rows are
    repeated, at most ten times, until they give 24 steps of four rows.
    """
    fraction = math.log(max(tokens, 1) / SMALL) / math.log(LARGE / SMALL)
    usual = MOST_EPOCHS - (MOST_EPOCHS - 1) * min(1.0, max(0.0, fraction))
    few = min(FEW_EPOCHS, FEW_STEPS * LEAST_ROWS / max(rows, 1))
    if few > usual:
        return round(few, 1), f"{rows} rows are few: repeated until they give {FEW_STEPS} steps"
    return round(usual, 1), f"{MOST_EPOCHS} up to 1 million tokens, 1 from 10 million"


def batch_size(tokens: int, mean_length: float, max_length: int) -> BatchSize:
    """Return the step of a run.

    A step has an eightieth of the run's tokens, so that a small run takes about 80 steps; at least
    four rows, at most 16,384 tokens. A micro-batch holds at most 4,096 tokens, and the longest row.

    Args:
        tokens: Of the whole run, all epochs.
        mean_length: Of a row.
        max_length: Of the longest row.
    """
    step = min(max(tokens / STEPS, LEAST_ROWS * mean_length), MOST_STEP)
    pieces = math.ceil(step / MOST_MICRO_BATCH)
    size = max(_eights(step / pieces), max_length)
    return BatchSize(size, max(1, round(step / size)))


def rank(supervised: int, parameters_per_rank: int) -> int:
    """Return the rank: 16, or the power of two that can hold what the rows say, at most 128.

    A parameter stores two bits, a supervised token brings at most about one ("LoRA Without
    Regret").

    Args:
        supervised: Supervised tokens of an epoch.
        parameters_per_rank: Trainable numbers of an adapter of rank 1.
    """
    result = RANK
    while result < MOST_RANK and capacity(result, parameters_per_rank) < supervised:
        result *= 2
    return result


def capacity(rank: int, parameters_per_rank: int) -> int:
    """Return the supervised tokens that an adapter can learn from before it limits learning."""
    return BITS_PER_PARAMETER * rank * parameters_per_rank


def validation_rows(rows: int) -> tuple[int, str]:
    """Return how many of ``rows`` validate, and why.

    A tenth, at least 8 (a quarter of fewer than 32), at most 256.
    """
    count = min(max(round(rows / 10), min(FEW_VALIDATION, rows // 4)), MOST_VALIDATION)
    if not count:
        return 0, f"{rows} rows are too few to hold any out: the last step is saved"
    if count < FEW_VALIDATION:
        return count, f"a quarter of {rows} rows, which are few"
    return (
        count,
        f"a tenth of {rows:,} rows, at least {FEW_VALIDATION} and at most {MOST_VALIDATION}",
    )


def validate_every(steps_per_epoch: float, epochs: float) -> int:
    """Return the steps between validations: three an epoch (or run), every 200 steps at least."""
    steps = steps_per_epoch * min(1.0, epochs)
    return max(1, min(round(steps / PER_EPOCH), MOST_BETWEEN))


def _eights(tokens: float) -> int:
    return 8 * math.ceil(tokens / 8)
