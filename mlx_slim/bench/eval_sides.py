"""One side of a scoring benchmark, in a process of its own: ours, or mlx-lm's scorer.

Invariant: both sides see the same prompts, dtype and BLAS, and are timed from the texts to the
answers. Try it:
``mlx-slim bench eval MODEL --task hellaswag --limit 100 --against mlx-lm``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx_slim  # noqa: F401  # before mlx.core: both sides get the same BLAS
from mlx_slim.bench.rounds import process_peak_bytes, reset_process_peak
from mlx_slim.reading import JsonObject

import mlx.core as mx  # isort: skip


@dataclass(frozen=True)
class EvalWork:
    """What a side answers.

    Attributes:
        model: Hub id or folder.
        task: Its name.
        limit: First rows only, or None.
        num_fewshot: Solved examples before each question; None takes the task's own.
        data_dir: Of the rows, or None.
        dtype: Computed in.
    """

    model: str
    task: str
    limit: int | None
    num_fewshot: int | None
    data_dir: str | None
    dtype: str


@dataclass(frozen=True)
class GenerationWork:
    """What is generated.

    Attributes:
        model: Hub id or folder.
        max_tokens: Longest answer, tokens.
    """

    model: str
    max_tokens: int


def read_questions(work: EvalWork) -> tuple[Any, Any, int]:
    """Return the task, its questions and the shots before each.

    Raises:
        SlimError: If the name stands for several tasks, or for a text.
    """
    from mlx_slim.errors import SlimError
    from mlx_slim.evaluation.tasks.prompts import build_questions
    from mlx_slim.evaluation.tasks.rows import load_rows
    from mlx_slim.evaluation.tasks.spec import expand

    selections = expand([work.task], work.num_fewshot)
    if len(selections) != 1:
        raise SlimError(f"{work.task} stands for {len(selections)} tasks", "name one of them")
    task, shots = selections[0].task, selections[0].num_fewshot
    if task.kind == "perplexity":
        raise SlimError(f"{task.name} predicts a text, it has no questions", "name another task")
    rows = load_rows(task, Path(work.data_dir) if work.data_dir else None)
    return task, build_questions(task, rows, shots, work.limit), shots


def _summary(seconds: float, answers: list[Any], setup: JsonObject) -> JsonObject:
    return {
        "questions_per_second": len(answers) / seconds,
        "seconds": seconds,
        "questions": len(answers),
        "peak_memory_bytes": mx.get_peak_memory(),
        "process_peak_bytes": process_peak_bytes(),
        "answers": answers,
        **setup,
    }


def ours(work: EvalWork) -> JsonObject:
    """Answer with our engine, chunk by chunk, as ``mlx-slim eval`` does."""
    from mlx_slim.evaluation.jobs import Engine, TaskJob
    from mlx_slim.evaluation.scoring.loglikelihood import LoglikelihoodScorer
    from mlx_slim.evaluation.scoring.requests import RequestEncoder, max_length
    from mlx_slim.models.half_weights import widen
    from mlx_slim.models.load import load
    from mlx_slim.models.row_limits import row_limit
    from mlx_slim.runtime import resolve_dtype

    task, questions, shots = read_questions(work)
    choices = bool(questions[0].choices)
    loaded = load(work.model, dtype=resolve_dtype(work.dtype), half_blocks=choices)
    engine = Engine(loaded.model, loaded.tokenizer, LoglikelihoodScorer(loaded.model))
    if choices and not engine.scorer.lists:
        widen(loaded.model)
    longest, limit = max_length(loaded.config, loaded.tokenizer), row_limit(loaded.config)
    encoder = RequestEncoder(loaded.tokenizer, longest, limit=limit)
    job = TaskJob(task, "", shots, work.limit, questions, encoder)
    mx.reset_peak_memory()
    reset_process_peak()
    begin = time.perf_counter()
    computed = [job.compute(chunk, engine) for chunk in job.chunks]
    seconds = time.perf_counter() - begin
    records = [record for chunk in computed for record in chunk.records]
    key = "loglikelihoods" if choices else "generation"
    roots = {chunk.group: chunk.root for chunk in computed}  # computed once for each group
    tokens = sum(chunk.tokens_computed for chunk in computed) + sum(roots.values())
    minimum = sum(chunk.tokens_minimum for chunk in computed) + sum(roots.values())
    setup = {
        "tokens_computed": tokens,
        "tokens_minimum": minimum,
        "tokens_computed_per_question": tokens / len(records),
    }
    return _summary(seconds, [record[key] for record in records], setup)


def mlx_lm(work: EvalWork) -> JsonObject:
    """Answer with the ``MLXLM`` class of ``mlx_lm.evaluate``, called directly."""
    from mlx_lm.evaluate import MLXLM

    from mlx_slim.models.opening import cast
    from mlx_slim.runtime import resolve_dtype

    task, questions, _ = read_questions(work)
    peer = MLXLM(work.model, use_chat_template=False)
    cast(peer._model, resolve_dtype(work.dtype))
    mx.eval(peer._model.parameters())
    pairs = [pair for q in questions for pair in q.pairs]
    options = {"until": list(task.spec.until), "max_gen_toks": task.spec.max_tokens}
    requests: list[Any] = [SimpleNamespace(args=pair) for pair in pairs]
    mx.reset_peak_memory()
    reset_process_peak()
    begin = time.perf_counter()
    if pairs:
        scores = iter(peer.loglikelihood(requests))
        answers: list[Any] = [
            [value for value, _ in itertools.islice(scores, len(q.choices))] for q in questions
        ]
    else:
        requests = [SimpleNamespace(args=(q.context, dict(options))) for q in questions]
        answers = list(peer.generate_until(requests))
    seconds = time.perf_counter() - begin
    return _summary(seconds, answers, {})


def generation(work: GenerationWork) -> JsonObject:
    """Answer one prompt as ``mlx-slim generate`` does, once to warm up and once for the clock."""
    from mlx_slim.evaluation.chat import open_session

    session = open_session(work.model)
    ids = session.text_ids("A long story of a fox who learned to read, from the beginning:\n\n")
    for limit in (4, work.max_tokens):
        mx.reset_peak_memory()
        for _ in session.stream(ids, max_tokens=limit, temperature=0.0):
            pass
    reply = session.last
    assert reply is not None
    return {
        "tokens_per_second": reply.tokens_per_second,
        "tokens": reply.tokens,
        "peak_memory_bytes": reply.peak_memory_bytes,
    }


def main() -> None:
    """Run the side named first with the work given as JSON; print one line of JSON."""
    name, work = sys.argv[1], json.loads(sys.argv[2])
    with contextlib.redirect_stdout(sys.stderr):
        if name == "generation":
            result = generation(GenerationWork(**work))
        else:
            result = {"ours": ours, "mlx-lm": mlx_lm}[name](EvalWork(**work))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
