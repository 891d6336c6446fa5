"""What to measure: the values that ``mlx-slim bench train`` and ``bench eval`` take.

Invariant: the only home of these defaults; nothing heavy is imported. Try it:
``mlx-slim bench train --help``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from annotated_types import Interval

from mlx_slim.config.options import option
from mlx_slim.config.values import MOST, MOST_SHOTS, Method, PositiveInt

METHODS: tuple[Method, ...] = get_args(Method)
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_DTYPE = option("Dtype of the computation; auto is bfloat16 on a GPU, float32 on a CPU.")
_ROUNDS = option("Alternating runs of each side; their medians are reported.")


@dataclass(frozen=True)
class BenchTrainOptions:
    """What both sides train, and how often.

    Attributes:
        data: Alpaca rows: hub id, mirror or file.
        method: What is trained.
        against: ``mlx-lm``; ``peft``, which is transformers and PEFT on PyTorch; another method of
            mlx-slim; or ``eager``: the same method compiled against not compiled, the second of two
            epochs timed.
        rows: Rows of the epoch (the first step is not timed).
        batch: The peer's rows per step; ours gets the token budget ``batch`` · ``max_length``.
        max_length: Longest row, tokens.
        system_tokens: Tokens of a system message before every row: what rows have in common.
        dtype: Of the computation; ``auto`` is bfloat16 on a GPU, float32 on a CPU.
        rounds: Times each side runs, alternating.
        profile: Instead, take our step apart: seconds and operations of each component.
    """

    data: str = field(
        default="tatsu-lab/alpaca", metadata=option("Rows to train on, in the format of Alpaca.")
    )
    method: Method = field(default="lora", metadata=option("What is trained."))
    against: Literal["mlx-lm", "peft", "lora", "qlora", "dora", "full", "eager"] = field(
        default="mlx-lm",
        metadata=option(
            "mlx-lm's trainer; peft: transformers and PEFT on PyTorch; another method of mlx-slim; "
            "or eager: train.compile=true against false, once each shape of a batch was met."
        ),
    )
    rows: Annotated[int, Interval(ge=12, le=MOST)] = field(
        default=48, metadata=option("Number of training rows.")
    )
    batch: PositiveInt = field(default=4, metadata=option("Rows in a batch of the other side."))
    max_length: Annotated[int, Interval(ge=16, le=MOST)] = field(
        default=512, metadata=option("Tokens of the longest row.")
    )
    system_tokens: Annotated[int, Interval(ge=0, le=MOST)] = field(
        default=0, metadata=option("Tokens of one system message that stands before every row.")
    )
    dtype: Dtype = field(default="auto", metadata=_DTYPE)
    rounds: PositiveInt = field(default=2, metadata=_ROUNDS)
    profile: bool = field(
        default=False,
        metadata=option(
            "Compare with nobody: print seconds and operations of each component of a step."
        ),
    )


@dataclass(frozen=True)
class BenchEvalOptions:
    """What both sides answer, and how often.

    Attributes:
        task: Name or file of a task.
        limit: Questions (of each subject, where a task has subjects).
        num_fewshot: Solved examples; None takes the task's own number.
        data_dir: Data mirror; None takes ``MLX_SLIM_DATA``, else the hub.
        against: The other side.
        dtype: Of the computation; ``auto`` is bfloat16 on a GPU, float32 on a CPU.
        rounds: Times each side runs, alternating.
    """

    task: str = field(default="hellaswag", metadata=option("Name or file of a task."))
    limit: PositiveInt = field(default=100, metadata=option("Number of questions."))
    num_fewshot: Annotated[int, Interval(ge=0, le=MOST_SHOTS)] | None = field(
        default=None, metadata=option("Examples in a prompt; the task's own by default.")
    )
    data_dir: Path | None = field(
        default=None, metadata=option("Folder of evaluation data; MLX_SLIM_DATA by default.")
    )
    against: Literal["mlx-lm", "lm-eval"] = field(
        default="mlx-lm",
        metadata=option("mlx-lm's scorer; or lm-eval: the reference harness on PyTorch."),
    )
    dtype: Dtype = field(default="auto", metadata=_DTYPE)
    rounds: PositiveInt = field(default=1, metadata=_ROUNDS)
