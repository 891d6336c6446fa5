"""How to score and to answer: the values that ``mlx-slim eval``, ``generate`` and ``chat`` take.

Invariant: the only home of these defaults; nothing heavy is imported. Try it:
``mlx-slim eval --help``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from mlx_slim.config.options import option
from mlx_slim.config.parallel import PARALLEL, PARALLEL_OPTION, Parallel
from mlx_slim.config.values import MOST, MOST_SHOTS, PositiveInt, Seed

Temperature = Annotated[float, Interval(ge=0, le=100)]
KVBits = Literal[8, 4]
DraftWidth = Annotated[int, Interval(ge=1, le=16)]


# What every command that answers says of them, and tokens that a draft proposes by default.
KV_BITS = option("Keep keys and values in B bits [the model's].", metavar="B")
DRAFT_MODEL = option("A smaller model of the same tokenizer that drafts.", metavar="MODEL")
DRAFT_WIDTH = 3
DRAFT_TOKENS = option("Tokens that the draft proposes at a time.", metavar="N")
ANSWERING_REVISION = option("Branch, tag or commit of a hub model.", metavar="REV")
ANSWERING_CODE = option("Run the repository's Python files.")


@dataclass(frozen=True)
class EvalOptions:
    """How to score; the only home of these defaults.

    Attributes:
        adapter: Adapter folder to put on every model; of several (``DIR`` or ``DIR=WEIGHT``) the
            weighted sum.
        num_fewshot: Solved examples before each question; None takes the task's default.
        limit: First rows of a task (of each subject of a group); None takes all.
        data_dir: Data mirror; None takes ``MLX_SLIM_DATA``, else the hub.
        perplexity: Text file or JSON lines to predict, in addition to the tasks.
        dtype: ``auto`` (bfloat16 on a GPU, float32 on a CPU) or a name of ``runtime.DTYPES``.
        apply_chat_template: Put every prompt into the model's chat template, as the harness does.
        fewshot_as_multiturn: With a chat template, examples are separate turns.
        system: Begins the system message of every prompt that goes through a chat template, before
            the task's description, as the harness's ``--system_instruction``.
        max_length: Longest input, tokens; None takes the model's.
        batch_tokens: Tokens of a batch, and of the caches of one batch of generated answers; None
            chooses by memory.
        kv_bits: Bits that keys and values are rounded to, as a quantized cache rounds them; None
            leaves them as they are.
        seed: Recorded; scoring itself is not random.
        revision: Branch, tag or commit of hub models.
        trust_remote_code: Run Python files that a repository brings.
        parallel: How ranks work on the questions: each on its own (``data``), or all on one model
            that is divided (``tensor``, ``pipeline``); ``auto`` divides what a rank cannot hold.
    """

    adapter: str | Path | Sequence[str | Path] | None = field(
        default=None,
        metadata=option(
            "Adapter for every model; several are summed with their weights.",
            metavar="DIR[=WEIGHT]",
            multiple=True,
        ),
    )
    num_fewshot: Annotated[int, Interval(ge=0, le=MOST_SHOTS)] | None = field(
        default=None, metadata=option("Solved examples before a question.", metavar="K")
    )
    limit: PositiveInt | None = field(
        default=None, metadata=option("Score the first N rows (of each subject).", metavar="N")
    )
    data_dir: Path | None = field(
        default=None, metadata=option("Folder of evaluation data [MLX_SLIM_DATA].", metavar="DIR")
    )
    perplexity: Path | None = field(
        default=None, metadata=option("Measure bits per byte of this text file.", metavar="FILE")
    )
    dtype: str = field(default="auto", metadata=option("auto, float32, bfloat16, float16."))
    apply_chat_template: bool = field(
        default=False, metadata=option("Apply the chat template to prompts.")
    )
    fewshot_as_multiturn: bool = field(
        default=True, metadata=option("With a chat template, examples are separate turns.")
    )
    system: str | None = field(
        default=None, metadata=option("System message, for the chat template.", metavar="TEXT")
    )
    max_length: Annotated[int, Interval(ge=2, le=MOST)] | None = field(
        default=None, metadata=option("Tokens of the longest input.", metavar="N")
    )
    batch_tokens: PositiveInt | None = field(
        default=None, metadata=option("Most tokens in a batch.", metavar="N")
    )
    kv_bits: KVBits | None = field(
        default=None,
        metadata=option("Round keys and values to B bits [the model's].", metavar="B"),
    )
    seed: Seed = field(default=0, metadata=option("Seed of the bootstrap intervals."))
    revision: str | None = field(
        default=None, metadata=option("Branch, tag or commit of hub models.", metavar="REV")
    )
    trust_remote_code: bool = field(
        default=False, metadata=option("Run Python files of the model repository.")
    )
    parallel: Parallel = field(default=PARALLEL, metadata=PARALLEL_OPTION)


@dataclass(frozen=True)
class GenerateOptions:
    """With which adapters, and how, ``mlx-slim generate`` answers.

    Attributes:
        adapter: Adapter folders (``DIR`` or ``DIR=WEIGHT``); of several the weighted sum.
        system: System message of the conversation; None has none.
        max_tokens: Longest answer, tokens.
        temp: Temperature of the sampling; 0 is greedy.
        seed: Of the sampling.
        kv_bits: Bits of the cache's keys and values; None keeps them in the model's dtype.
        draft_model: Folder or hub id of a smaller model that drafts tokens; None drafts none.
        num_draft_tokens: Tokens that it drafts at a time.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Run Python files that the repository brings.
        parallel: How several ranks divide the model; ``auto`` is ``tensor`` where that can be.
    """

    adapter: tuple[str, ...] = field(
        default=(),
        metadata=option(
            "Adapter folder; several are summed with their weights.",
            metavar="DIR[=WEIGHT]",
            multiple=True,
        ),
    )
    system: str | None = field(
        default=None, metadata=option("System message, for the chat template.", metavar="TEXT")
    )
    max_tokens: PositiveInt = field(default=256, metadata=option("Tokens of the longest answer."))
    temp: Temperature = field(default=0.0, metadata=option("Sampling temperature; 0: greedy."))
    seed: Seed = field(default=0, metadata=option("Seed of the sampling."))
    kv_bits: KVBits | None = field(default=None, metadata=KV_BITS)
    draft_model: str | None = field(default=None, metadata=DRAFT_MODEL)
    num_draft_tokens: DraftWidth = field(default=DRAFT_WIDTH, metadata=DRAFT_TOKENS)
    revision: str | None = field(default=None, metadata=ANSWERING_REVISION)
    trust_remote_code: bool = field(default=False, metadata=ANSWERING_CODE)
    parallel: Parallel = field(default=PARALLEL, metadata=PARALLEL_OPTION)


@dataclass(frozen=True)
class ChatOptions(GenerateOptions):
    """With which adapters, and how, ``mlx-slim chat`` answers.

    Attributes:
        max_tokens: Longest answer, tokens.
        temp: Temperature of the sampling; 0 is greedy.
    """

    max_tokens: PositiveInt = field(default=512, metadata=option("Tokens of the longest answer."))
    temp: Temperature = field(default=0.7, metadata=option("Sampling temperature; 0: greedy."))
